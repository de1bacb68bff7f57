"""What the machine gives: CPU threads, a device and its precision, several processes."""

import os
import time

import torch


def set_threads(threads: int = 0) -> None:
    """Use so many CPU threads; 0 takes one per core, or only one where other work keeps the cores busy.

    PyTorch's threads wait for each other after every operation and spin meanwhile. Where one of them shares its core
    with another program, all the others wait: two threads are then slower than one (`benchmarks/busy_cores.py`). The
    load average is a minute late, and in a container it is the host's, so this measures for 0.4 s which is faster.
    A user's own OMP_NUM_THREADS, which torchrun also sets, is left alone.
    """
    most = torch.get_num_threads()
    if threads or "OMP_NUM_THREADS" in os.environ or most == 1:
        torch.set_num_threads(threads or most)
        return
    matrix, done = torch.rand(256, 256), {1: 0, most: 0}
    for number in (most, 1, most, 1):
        torch.set_num_threads(number)
        matrix @ matrix  # starts the threads
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            (matrix @ matrix).relu_()
            done[number] += 1
    torch.set_num_threads(most)
    if done[most] < 1.3 * done[1]:  # 1.6 to 1.9 on two idle cores, below 1.1 where one of them is busy
        torch.set_num_threads(1)
        print(f"note: other work keeps the CPU busy: using 1 thread, not {most} (OMP_NUM_THREADS={most} insists)")
