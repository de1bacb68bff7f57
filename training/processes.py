"""CPU threads, the device and its precision, several processes."""

import atexit
import ctypes
import os
import platform
import sys
import time
from contextlib import suppress

import torch
import torch.distributed as dist
import torch.nn as nn

from common.files import UserError

ALL_THREADS = torch.get_num_threads()


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next one (mallopt(3) explains the two parameters).

    Otherwise it returns large blocks to the kernel, which hands them out again page by page: a sixth of a step's time.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with suppress(AttributeError, OSError, TypeError):  # another C library, which has no mallopt
        ctypes.CDLL(None).mallopt(trim_threshold, -1)  # gives nothing back from the end of the heap
        ctypes.CDLL(None).mallopt(mmap_max, 0)  # and takes no block outside of it


def set_threads(threads: int = 0) -> int:
    """Use this many CPU threads; 0 takes one per core, or only one where other work keeps the cores busy.

    PyTorch's threads spin while they wait for each other, so if one of them shares its core with another program, two
    threads are slower than one (`benchmarks/busy_cores.py`). Load averages lag, and in a container show the host, so
    this measures for 0.4 s. It leaves a user's own OMP_NUM_THREADS alone, and returns the number of threads.
    """
    keep_freed_memory()
    most = ALL_THREADS
    is_mac = sys.platform == "darwin"  # its matrix products have threads of their own
    if not threads and most > 1 and "OMP_NUM_THREADS" not in os.environ and not is_mac:
        matrix, done = torch.rand(256, 256), {1: 0, most: 0}
        for number in (most, 1, most, 1):
            torch.set_num_threads(number)
            matrix @ matrix  # starts the threads
            end = time.perf_counter() + 0.1
            while time.perf_counter() < end:
                (matrix @ matrix).relu_()
                done[number] += 1
        if done[most] < 1.3 * done[1]:  # 1.6 to 1.9 on two idle cores, below 1.1 where one of them is busy
            threads = 1
            print(f"note: other work keeps the CPU busy, so 1 thread is used, not {most}")
    torch.set_num_threads(threads or most)
    return threads or most


def choose_device(name: str) -> torch.device:
    """The device of a setting; "auto" takes CUDA, then MPS, then the CPU. A UserError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in there if there[kind]) if name == "auto" else name
    if not there[name]:
        raise UserError(
            f"--device {name}: PyTorch sees no such device here; start a run with --device auto, or resume "
            "this one where it began"
        )
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """What matrix products compute in; "auto" takes bfloat16 only where the hardware has instructions for it.

    On a CPU without them a bfloat16 matrix product is some hundred times slower than a float32 one.
    """
    if name != "auto":
        return name
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if fast else "float32"


def environment(device: str, precision: str, threads: int) -> str:
    """What a run computes on, in words, for its checkpoint and the tables of results."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    words = f"torch {torch.__version__}, {platform.machine()}, {name}, {precision}"
    return f"{words}, {threads} CPU threads, {count()} processes"


def join(device: torch.device) -> tuple[int, int]:
    """Meet the processes that torchrun started, over NCCL on GPUs, gloo on CPUs; return the rank and their number."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    is_left_over = device.type == "cuda" and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count()
    if is_left_over or device.type == "mps":
        raise UserError(f"not every process has a {device.type} device: start fewer, or give --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" is this one from now on
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this is the process that reports and saves."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def count() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_part(rows: torch.Tensor) -> torch.Tensor:
    """Of rows (N, ...) those that this process takes, (N / processes, ...)."""
    return rows[dist.get_rank() :: count()] if dist.is_initialized() else rows


def average_gradients(model: nn.Module) -> None:
    """Average the gradients over the processes, always in one order, so that a resumed run rounds alike."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if count() > 1:
        dist.all_reduce(flat := torch.cat([gradient.flatten().float() for gradient in gradients]))
        for gradient, mean in zip(gradients, (flat / count()).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Interleave the rows (N, ...) of all processes: (N * processes, ...)."""
    if count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)
