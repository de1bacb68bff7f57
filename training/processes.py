"""CPU threads, the device and its precision, several processes."""

import atexit
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from common.files import UserError

ALL_THREADS = torch.get_num_threads()


def measure(
    prepare: Callable[[Any], Callable[[], Any]], choices: list, seconds: float
) -> dict[Any, float]:
    """How many times a second a piece of work gets done with each of the choices.

    `prepare` makes a choice and returns the work. The choices take turns, two each, so that they
    meet the same disturbances.
    """
    done = dict.fromkeys(choices, 0)
    spent = dict.fromkeys(choices, 0.0)
    for choice in 2 * choices:
        work = prepare(choice)
        work()  # starts threads, picks algorithms
        start = now = time.perf_counter()
        while now < start + seconds / len(choices) / 2:
            work()
            done[choice] += 1
            now = time.perf_counter()
        spent[choice] += now - start
    return {choice: done[choice] / spent[choice] for choice in choices}


def set_threads(threads: int = 0) -> int:
    """Use this many CPU threads; 0 takes one per core, or fewer where some cores are busy.

    PyTorch's threads spin while they wait for each other, so if one of them shares its core with
    another program, all are slower than fewer would be (`benchmarks/speed.py busy`). Load averages
    lag, and in a container show the host, so this measures for 0.4 s. It leaves a user's own
    OMP_NUM_THREADS alone, and returns the number of threads.
    """
    is_mac = sys.platform == "darwin"  # its matrix products have threads of their own
    if not threads:
        is_given = ALL_THREADS == 1 or "OMP_NUM_THREADS" in os.environ or is_mac
        threads = ALL_THREADS if is_given else choose_threads(ALL_THREADS)
    torch.set_num_threads(threads)
    return threads


def choose_threads(most: int) -> int:
    """All of the threads; or one, half, all but one, if these do clearly more for their number."""
    matrix = torch.rand(256, 256)

    def prepare(number: int) -> Callable[[], torch.Tensor]:
        torch.set_num_threads(number)
        return lambda: (matrix @ matrix).relu_()

    choices = sorted({1, max(1, most // 2), most - 1, most})
    rates = measure(prepare, choices, seconds=0.4)
    # Twice the threads have to do 1.4 times as much. Two idle cores do 1.6 to 1.9 times as much as
    # one, and below 1.1 where one of them is busy.
    score = {number: rate / number**0.5 for number, rate in rates.items()}
    best = max(choices, key=score.get)
    if score[best] <= 1.1 * score[most]:
        return most
    print(f"note: other work keeps the CPU busy, so the number of threads is {best}, not {most}")
    return best


def choose_device(name: str) -> torch.device:
    """The device of a setting; "auto" takes CUDA, then MPS, then the CPU."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    name = next(kind for kind in there if there[kind]) if name == "auto" else name
    if not there[name]:
        advice = "start a run with --device auto, or resume this one where it began"
        raise UserError(f"--device {name}: PyTorch sees no such device here; {advice}")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """What matrix products compute in; "auto" takes bfloat16 only where it is faster.

    A CPU without bfloat16 instructions is some hundred times slower in it. One that has them may be
    slower, too, so it is measured, for 0.2 s.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        is_faster = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        has_instructions = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        is_faster = has_instructions and bfloat16_speed_up() > 1.1
    return "bfloat16" if is_faster else "float32"


def bfloat16_speed_up() -> float:
    """How many times faster this CPU trains a convolution in bfloat16 than in float32."""
    convolution = nn.Conv2d(32, 32, kernel_size=3, padding=1).to(memory_format=torch.channels_last)
    images = (
        torch.rand(64, 32, 14, 14).contiguous(memory_format=torch.channels_last).requires_grad_()
    )

    def prepare(precision: str) -> Callable[[], None]:
        def work() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                output = convolution(images)
            output.sum().backward()

        return work

    rates = measure(prepare, ["float32", "bfloat16"], seconds=0.2)
    return rates["bfloat16"] / rates["float32"]


def environment(device: str, precision: str, threads: int) -> str:
    """What a run computes on, in words, for its checkpoint and the tables of results."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    words = f"torch {torch.__version__}, {platform.machine()}, {name}, {precision}"
    return f"{words}, {threads} CPU threads, {count()} processes"


def join(device: torch.device) -> tuple[int, int]:
    """Meet the processes that torchrun started; returns the rank and their number."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    is_left_over = (
        device.type == "cuda" and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count()
    )
    if is_left_over or device.type == "mps":
        raise UserError(
            f"not every process has a {device.type} device: start fewer, or give --device cpu"
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" is this one from now on
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this is the process that reports and saves."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def rank() -> int:
    """The number of this process among those that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_restart() -> bool:
    """Whether torchrun starts this command again since a process failed (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def count() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def of_the_first(value: Any) -> Any:
    """The first process's value, in all of them; it may be anything that pickle takes."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def own_part(rows: torch.Tensor) -> torch.Tensor:
    """Of rows (N, ...) those that this process takes, (N / processes, ...)."""
    return rows[dist.get_rank() :: count()] if dist.is_initialized() else rows


def average_gradients(model: nn.Module) -> None:
    """Average gradients over the processes, in one order, so that a resumed run rounds alike."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if count() > 1:
        dist.all_reduce(flat := torch.cat([gradient.flatten().float() for gradient in gradients]))
        for gradient, mean in zip(
            gradients, (flat / count()).split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Interleave the rows (N, ...) of all processes: (N * processes, ...)."""
    if count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)
