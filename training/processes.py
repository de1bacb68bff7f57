"""CPU threads, the device and its precision, several processes."""

import copy
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.files import UserError

ALL_THREADS = torch.get_num_threads()


def rate(work: Callable[[], Any]) -> float:
    """How often a second some work gets done, measured for 0.1 s."""
    work()  # starts threads, picks algorithms
    start, spent, done = time.perf_counter(), 0.0, 0
    while spent < 0.1:
        work()
        done += 1
        spent = time.perf_counter() - start
    return done / spent


def set_threads(threads: int = 0) -> int:
    """Use and return a number of CPU threads; 0 takes one per core, or fewer.

    Fewer are faster where other programs keep cores busy (`benchmarks/speed.py busy`).
    """
    is_mac = sys.platform == "darwin"  # its BLAS has threads of its own
    if not threads and not is_mac and "OMP_NUM_THREADS" not in os.environ:
        threads = choose_threads(ALL_THREADS)
    torch.set_num_threads(threads or ALL_THREADS)
    return torch.get_num_threads()


def choose_threads(most: int) -> int:
    """All threads, or one, half, or all but one, if these do clearly more for their number.

    Twice the threads have to do 1.3 times as much; idle cores do 1.6 to 1.9, half busy ones 1.1.
    """
    matrix, score = torch.rand(256, 256), {}
    for threads in {1, max(1, most // 2), max(1, most - 1), most}:
        torch.set_num_threads(threads)
        score[threads] = rate(lambda: (matrix @ matrix).relu_()) / threads**0.5
    best = max(score, key=score.get)
    if score[best] <= 1.1 * score[most]:
        return most
    print(f"note: some cores are busy: using {best} of {most} threads")
    return best


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" takes CUDA, then MPS, then the CPU."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind in found if found[kind])
    if not found[name]:
        advice = "start a run with --device auto, or resume this one where it began"
        raise UserError(f"--device {name}: PyTorch sees no such device; {advice}")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """What matrix products compute in; "auto" takes bfloat16 only where it is faster."""
    if name != "auto":
        return name
    is_faster = False
    if device.type == "cuda":
        is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        has = torch.cpu.get_capabilities().get  # else a hundred times slower
        is_faster = (has("avx512_bf16") or has("amx_bf16")) and bfloat16_speed_up() > 1.1
    return "bfloat16" if is_faster else "float32"


def bfloat16_speed_up() -> float:
    """How many times faster this CPU trains a convolution in it than in float32."""
    convolution = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    images = torch.rand(64, 32, 14, 14).to(memory_format=torch.channels_last).requires_grad_()

    def train(is_low: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_low):
            output = convolution(images)
        output.sum().backward()

    return rate(partial(train, True)) / rate(partial(train, False))


def settle(config: SimpleNamespace) -> tuple[SimpleNamespace, torch.device]:
    """Meet other processes; return a copy of the settings without "auto", and the device."""
    config = copy.copy(config)
    device = choose_device(config.device)
    config.device = device.type
    join(device)
    threads = set_threads(config.threads)
    precision = choose_precision(config.precision, device)
    # All processes, and a resumed run, have to compute alike.
    config.threads, config.precision = of_the_first((threads, precision))
    torch.set_num_threads(config.threads)
    return config, device


def environment(config: SimpleNamespace) -> str:
    """What a run computes on, in words."""
    name = torch.cuda.get_device_name() if config.device == "cuda" else config.device
    words = f"torch {torch.__version__}, {platform.machine()}, {name}, {config.precision}"
    return f"{words}, {config.threads} CPU threads, {count()} processes"


def rank() -> int:
    """The number of this process."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def count() -> int:
    """How many processes torchrun started."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def is_restarted() -> bool:
    """Whether torchrun has started this process again, as with --max-restarts."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def is_first() -> bool:
    """Whether this process reports and saves."""
    return rank() == 0


def join(device: torch.device) -> None:
    """Meet the other processes, if there are any."""
    if count() == 1:
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    devices = dict(cuda=torch.cuda.device_count(), mps=0, cpu=count())
    if local_rank >= devices[device.type]:
        raise UserError("more processes than devices: start fewer, or give --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(local_rank)  # "cuda" is this one from now on
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    """If it met others, end the process without Python's clean-up.

    Gloo's threads may still hold tensors, and abort it (pytorch issue 190489).
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def of_the_first(value: Any) -> Any:
    """The first process's value, in all of them."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def own_part(rows: Tensor) -> Tensor:
    """The process's part of rows (N, ...)."""
    return rows if count() == 1 else rows[rank() :: count()]


def average_gradients(model: nn.Module) -> None:
    """Average over the processes, all at once, so that a resumed run rounds alike."""
    if count() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    means = (flat / count()).split([g.numel() for g in gradients])
    for g, mean in zip(gradients, means, strict=True):
        g.copy_(mean.view_as(g))


def gather(rows: Tensor) -> Tensor:
    """Interleave the rows (N, ...) of all processes: (N * processes, ...)."""
    if count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)
