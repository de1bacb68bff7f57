"""What the machine gives, and several processes, which together do what one does."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, assert_alike

import dataset
import train
from common.files import UserError
from model import load_checkpoint
from training import processes
from training.processes import choose_device, choose_precision, set_threads

# ---- Threads, device and precision ----


@pytest.fixture
def cores(monkeypatch):
    def make(number, busy):
        def clock():  # moves only with the work
            threads = torch.get_num_threads()
            # Whoever shares a core with another program holds all others up.
            now[0] += 0.01 / (threads**0.8 if threads + busy <= number else 1.0)
            return now[0]

        now = [0.0]
        monkeypatch.setattr(processes, "time", SimpleNamespace(perf_counter=clock))
        monkeypatch.setattr(processes, "ALL_THREADS", number)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield make
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "number, busy, threads", [(2, 0, 2), (2, 1, 1), (16, 1, 15), (16, 8, 8), (16, 9, 1)]
)
def test_as_many_cores_are_taken_as_are_free(cores, capsys, number, busy, threads):
    cores(number, busy)
    assert set_threads() == torch.get_num_threads() == threads
    assert ("cores are busy" in capsys.readouterr().out) == (busy > 0)


@pytest.mark.parametrize("asked, threads", [(2, 2), (0, 4)])
def test_a_number_of_threads_that_is_given_is_kept(cores, monkeypatch, asked, threads):
    cores(4, busy=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert set_threads(asked) == torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_an_accelerator_where_there_is_one(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == expected and choose_device("cpu").type == "cpu"
    if not cuda:
        with pytest.raises(UserError, match="--device cuda: PyTorch sees no such device"):
            choose_device("cuda")


def test_processes_without_a_device_each_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="more processes than devices"):
        processes.join(torch.device("cuda"))


@pytest.mark.parametrize(
    "instruction, speed_up, expected",
    [
        ("avx2", None, "float32"),  # not even tried: a hundred times slower
        ("avx512_bf16", 0.8, "float32"),
        ("amx_bf16", 1.3, "bfloat16"),
    ],
)
def test_automatic_precision_is_the_faster_one(monkeypatch, instruction, speed_up, expected):
    def rate(work):
        work()
        return rates[-1]

    def convolve(layer, images):
        rates.append(speed_up if torch.is_autocast_enabled("cpu") else 1.0)
        return forward(layer, images)

    forward, rates = nn.Conv2d.forward, []
    monkeypatch.setattr(nn.Conv2d, "forward", convolve)
    monkeypatch.setattr(processes, "rate", rate)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True})
    assert choose_precision("auto", torch.device("cpu")) == expected
    assert choose_precision("bfloat16", torch.device("cpu")) == "bfloat16"
    is_fast = expected == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: is_fast)
    assert choose_precision("auto", torch.device("cuda")) == expected
    assert choose_precision("auto", torch.device("mps")) == "float32"


# ---- Several processes ----


@pytest.fixture
def together(small_data, tmp_path):
    """Runs train.py in several processes, after some lines of Python."""

    def run(*flags, first="", number=2):
        script = tmp_path / "train_small.py"
        lines = [f"import sys; sys.path.insert(0, {str(ROOT)!r})", "import dataset, train"]
        lines += [f"dataset.FILES = {dataset.FILES}", first, "train.main()"]
        script.write_text("\n".join(lines))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        command = map(str, [sys.executable, *launcher, script.name, *flags])
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        options = dict(env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        return subprocess.run([*command], **options)

    return run


@pytest.mark.slow
def test_two_processes_train_like_one_and_one_of_them_reports(
    together, run_config, flags, tmp_path, monkeypatch
):
    # Batch norm, which sees half a batch in each process, goes without its statistics.
    plain = "train.nn.BatchNorm2d.forward = lambda n, x: x * n.weight[:, None, None]"
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda n, x: x * n.weight[:, None, None])
    result = together(*flags, "--drop-path", 0, "--output-dir", "two", first=plain)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^epoch \d/2 ", result.stdout, re.MULTILINE)) == 2
    assert result.stdout.count("test accuracy") == 1
    alone = load_checkpoint(train.train(run_config(drop_path=0.0)))[1]
    two = load_checkpoint(tmp_path / "two" / "best.pt")[1]
    for a, b in zip(alone["history"], two["history"], strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
    head = alone["model"]["head.weight"]
    torch.testing.assert_close(two["model"]["head.weight"], head, rtol=1e-2, atol=1e-3)


# torchrun is made to stop all in the second epoch.
STOP = """
import os, signal, time
take_step, calls = train.take_step, []
def stopping(*arguments):
    take_step(*arguments)
    calls.append(1)
    if len(calls) == 13:
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(9999)
train.take_step = stopping
"""


@pytest.mark.slow
def test_three_stopped_processes_end_bit_for_bit_alike(together, flags, tmp_path):
    # Three, since adding up two gradients rounds alike in any order.
    flags = [*flags, "--batch-size", 15, "--skip-easy", 0.3, "--whiten"]
    whole = together(*flags, "--output-dir", "whole", number=3)
    assert whole.returncode == 0, whole.stderr
    parts = together(*flags, "--output-dir", "parts", first=STOP, number=3)
    assert parts.returncode != 0
    assert " -m torch.distributed.run --nproc-per-node=3 train_small.py --resume" in parts.stdout
    assert len(load_checkpoint(tmp_path / "parts" / "last.pt")[1]["history"]) == 1
    resumed = together("--resume", "--output-dir", "parts", number=3)
    assert resumed.returncode == 0, resumed.stderr
    assert_alike(tmp_path)


def test_processes_that_cannot_share_the_work_are_refused(run_config, monkeypatch):
    train.train(run_config(epochs=1))
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "join", lambda device: None)
    monkeypatch.setattr(processes, "of_the_first", lambda value: value)
    with pytest.raises(UserError, match=r"--batch-size 15: give .* the 2 processes"):
        train.train(run_config(batch_size=15))
    with pytest.raises(UserError, match="the run to resume had 1 processes, not 2"):
        train.train(run_config(epochs=1), resume=True)
