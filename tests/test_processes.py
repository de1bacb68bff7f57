"""What the machine gives, and several processes by torchrun: together they do what one alone would
do.
"""

import itertools
import json
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, SMALL_RUN, assert_identical, flags_of, state_of

import dataset
import train
from common.files import UserError
from model import load_checkpoint
from training import processes
from training.processes import choose_device, choose_precision, gather, set_threads

# ---- Threads, device and precision ---------------------------------------------------------------


@pytest.fixture
def cores(monkeypatch):
    """A machine with many cores, and a clock that only the measured work moves: by 0.01 s over the
    speed.
    """

    def make(number, speed):
        now = itertools.accumulate(0.01 / speed(torch.get_num_threads()) for _ in itertools.count())
        monkeypatch.setattr(processes, "time", SimpleNamespace(perf_counter=lambda: next(now)))
        monkeypatch.setattr(processes, "ALL_THREADS", number)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield make
    torch.set_num_threads(1)


@pytest.mark.parametrize("ratio, threads", [(1.0, 1), (1.2, 1), (1.4, 2), (1.9, 2)])
def test_one_thread_is_taken_where_two_are_hardly_faster(cores, capsys, ratio, threads):
    cores(2, lambda number: {1: 1, 2: ratio}[number])
    assert set_threads() == torch.get_num_threads() == threads
    assert ("other work keeps the CPU busy" in capsys.readouterr().out) == (threads == 1)


@pytest.mark.parametrize("busy, threads", [(0, 16), (1, 15), (2, 8), (8, 8), (9, 1)])
def test_of_many_cores_as_many_are_taken_as_are_free(cores, busy, threads):
    # Whoever shares a core with another program holds all others up.
    cores(16, lambda number: number**0.8 if number + busy <= 16 else 1.0)
    assert set_threads() == torch.get_num_threads() == threads


def test_choices_are_measured_in_turns_and_by_the_time_that_they_took(monkeypatch):
    now, turns = [0.0], []

    def prepare(choice):
        turns.append(choice)

        def work():
            now[0] += {"slow": 0.5, "fast": 0.25}[choice]  # longer than a turn, too

        return work

    monkeypatch.setattr(processes, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert processes.measure(prepare, ["slow", "fast"], seconds=0.8) == {"slow": 2.0, "fast": 4.0}
    assert turns == ["slow", "fast", "slow", "fast"]


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_number_of_threads_that_is_asked_for_is_not_measured(cores, monkeypatch, asked):
    monkeypatch.setattr(processes, "time", None)
    assert set_threads(asked) == torch.get_num_threads() == asked


def test_a_users_own_number_of_threads_is_left_alone(monkeypatch):
    monkeypatch.setattr(processes, "time", None)
    monkeypatch.setattr(processes, "ALL_THREADS", 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert set_threads() == torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_an_accelerator_where_there_is_one(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == expected and choose_device("cpu").type == "cpu"
    for name in ("cuda", "mps")[: 2 if expected == "cpu" else 0]:
        with pytest.raises(UserError, match=f"--device {name}: PyTorch sees no such device"):
            choose_device(name)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_processes_without_a_device_each_are_refused(monkeypatch, kind):
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(
        UserError, match=f"not every process has a {kind} device: start fewer, or give --device cpu"
    ):
        processes.join(torch.device(kind))


@pytest.mark.parametrize(
    "instructions, speed_up, expected",
    [
        ({"avx2": True}, None, "float32"),  # not even tried: a hundred times slower
        ({"avx512_bf16": True}, 0.8, "float32"),
        ({"avx512_bf16": True}, 1.3, "bfloat16"),
        ({"amx_bf16": True}, 2.0, "bfloat16"),
    ],
)
def test_automatic_precision_is_the_faster_one_of_a_cpu(
    monkeypatch, instructions, speed_up, expected
):
    def measure(prepare, choices, seconds):
        for choice in choices:
            prepare(choice)()
        return dict(float32=50.0, bfloat16=50.0 * speed_up)

    def convolve(layer, images):
        computed_in.append(
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        )
        return forward(layer, images)

    forward, computed_in = nn.Conv2d.forward, []
    monkeypatch.setattr(nn.Conv2d, "forward", convolve)
    monkeypatch.setattr(processes, "measure", measure)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == expected
    assert computed_in == ([torch.float32, torch.bfloat16] if speed_up else [])
    assert (
        choose_precision("float32", cpu) == "float32"
        and choose_precision("bfloat16", cpu) == "bfloat16"
    )


@pytest.mark.parametrize(
    "capability, expected", [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_automatic_precision_takes_bfloat16_on_gpus_that_compute_in_it(
    monkeypatch, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")) == expected
    assert choose_precision("auto", torch.device("mps")) == "float32"


# ---- Several processes ---------------------------------------------------------------------------


def test_rows_of_all_processes_are_put_together_in_the_order_of_the_batch(monkeypatch):
    rows = torch.arange(12).view(6, 2)
    assert torch.equal(gather(rows), rows)  # alone
    parts = [rows[rank::3] for rank in range(3)]

    def all_gather(received, own):
        for target, part in zip(received, parts, strict=True):
            target.copy_(part)

    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes.dist, "all_gather", all_gather)
    assert torch.equal(gather(parts[1]), rows)


def test_gradients_are_averaged_over_the_processes(monkeypatch):
    model = nn.Linear(3, 2)
    own = [torch.full_like(p, i + 1.0) for i, p in enumerate(model.parameters())]
    for p, gradient in zip(model.parameters(), own, strict=True):
        p.grad = gradient.clone()
    others = 5.0  # the gradients of the two other processes, added up
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.add_(others))
    processes.average_gradients(model)
    assert [p.grad.unique().tolist() for p in model.parameters()] == [[2.0], [pytest.approx(7 / 3)]]


@pytest.fixture
def together(small_data, tmp_path):
    """Runs train.py in several processes on the small data set, with some lines of Python before it
    starts.
    """

    def run(*flags, first="", number=2):
        script = tmp_path / "train_small.py"
        lines = [f"import json, sys; sys.path.insert(0, {str(ROOT)!r})", "import dataset, train"]
        lines += [
            f"dataset.FILES = json.loads({json.dumps(dataset.FILES)!r})",
            first,
            "train.main()",
        ]
        script.write_text("\n".join(lines))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        command = [sys.executable, *launcher, script, *flags]
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        options = dict(env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return subprocess.run([str(word) for word in command], **options)

    return run


@pytest.fixture
def flags(small_data):
    return [*flags_of(SMALL_RUN), "--data-dir", str(small_data)]


@pytest.mark.slow
def test_two_processes_train_like_one_and_one_of_them_reports(
    together, run_config, flags, tmp_path, monkeypatch
):
    # Batch norm sees half a batch in each process. Without its statistics, the two do exactly what
    # one does.
    scaled = "x * n.weight[:, None, None] + n.bias[:, None, None]"
    plain = f"train.nn.BatchNorm2d.forward = lambda n, x: {scaled}"
    monkeypatch.setattr(
        nn.BatchNorm2d, "forward", lambda n, x: x * n.weight[:, None, None] + n.bias[:, None, None]
    )
    result = together(*flags, "--drop-path", 0, "--output-dir", "two", first=plain)
    assert result.returncode == 0, result.stderr
    assert "160 training images, processes: 2" in result.stdout
    assert len(re.findall(r"^epoch \d/2 ", result.stdout, re.MULTILINE)) == 2
    assert result.stdout.count("test accuracy") == 1
    made = {"best.pt", "last.pt", "history.csv", "best_curves.png", "best_confusion_matrix.png"}
    assert {path.name for path in (tmp_path / "two").glob("[!.]*")} == made
    alone = load_checkpoint(train.train(run_config(drop_path=0.0)))[1]
    two = load_checkpoint(tmp_path / "two" / "best.pt")[1]
    assert len(alone["history"]) == len(two["history"]) == 2
    for a, b in zip(alone["history"], two["history"], strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
    head = alone["model"]["head.weight"]
    torch.testing.assert_close(two["model"]["head.weight"], head, rtol=1e-2, atol=1e-3)


STOP = """
import os, time
take_step, calls = train.take_step, []
def stopping(*arguments):
    take_step(*arguments)
    calls.append(1)
    if len(calls) == {step}:
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), {number})
        time.sleep(60)
train.take_step = stopping
"""


@pytest.mark.slow
def test_three_stopped_processes_end_bit_for_bit_like_uninterrupted_ones(together, flags, tmp_path):
    # Three, since adding up two gradients rounds alike in any order.
    flags = [*flags, "--batch-size", 15, "--skip-easy", 0.3, "--whiten"]
    whole = together(*flags, "--output-dir", "whole", number=3)
    assert whole.returncode == 0, whole.stderr
    # The first process asks torchrun to stop all within the second epoch: as a queue does, and as
    # Ctrl-C does.
    for start, step, number in ((flags, 13, signal.SIGTERM), (["--resume"], 3, signal.SIGINT)):
        parts = together(
            *start,
            "--output-dir",
            "parts",
            first=STOP.format(step=step, number=int(number)),
            number=3,
        )
        assert parts.returncode != 0
        assert (
            "go on from the last whole epoch with: torchrun --nproc-per-node=3 train.py --resume"
            in parts.stdout
        )
        assert len(load_checkpoint(tmp_path / "parts" / "last.pt")[1]["history"]) == 1
    resumed = together("--resume", "--output-dir", "parts", number=3)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("last.pt", "best.pt"):
        assert_identical(state_of(tmp_path / "whole", name), state_of(tmp_path / "parts", name))


@pytest.mark.slow
def test_processes_that_cannot_share_the_work_are_refused_in_one_line(
    together, run_config, flags, tmp_path
):
    result = together(*flags, "--batch-size", 15)
    assert result.returncode != 0
    assert (
        "train.py: error: --batch-size 15: give at most 160, divisible by the 2 processes"
        in result.stderr
    )
    train.train(run_config(epochs=1))
    result = together("--resume", "--output-dir", tmp_path / "run")
    assert result.returncode != 0
    assert (
        "train.py: error: the run to resume had 1 processes, not 2: start as many again"
        in result.stderr
    )


def test_a_run_of_two_processes_is_not_resumed_by_one(run_config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(processes, "count", lambda: 2)
        patch.setattr(processes, "of_the_first", lambda value: value)
        patch.setattr(processes, "gather", lambda rows: rows)
        patch.setattr(processes, "average_gradients", lambda model: None)
        train.train(run_config(epochs=1))
    with pytest.raises(
        UserError, match="the run to resume had 2 processes, not 1: start as many again"
    ):
        train.train(run_config(epochs=1), resume=True)
