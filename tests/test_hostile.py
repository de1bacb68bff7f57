"""Hostile files, full disks, killed runs: each ends well or in one line."""

import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, assert_identical, flags_of, state_of

import train
from common.files import UserError
from model import load_checkpoint, save_checkpoint


@pytest.fixture
def good(small_model, tmp_path):
    save_checkpoint(tmp_path / "good.pt", small_model)
    return tmp_path / "good.pt"


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_run(good, tmp_path):
    touched = tmp_path / "touched"
    content = torch.load(good) | dict(trap=Trap(touched))
    pickled, old = tmp_path / "pickled.pt", tmp_path / "old.pt"
    pickled.write_bytes(pickle.dumps(content))
    torch.save(content, old, _use_new_zipfile_serialization=False)
    torch.save(content, good)
    for path in (pickled, old, good):
        with pytest.raises(UserError):
            load_checkpoint(path)
    assert not touched.exists()
    torch.load(good, weights_only=False)
    assert touched.exists()  # the trap is real


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(good, small_model):
    before = good.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(0, len(before) - 1, 3000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            with pytest.raises(UserError):
                save_checkpoint(good, small_model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert good.read_bytes() == before and list(good.parent.iterdir()) == [good]


def run_in(folder, data_dir):
    """Begin a run of ten epochs, or go on with it."""
    flags = flags_of(SMALL_RUN | dict(epochs=10, data_dir=str(data_dir)))
    if (folder / "last.pt").exists():
        flags = ["--resume"]
    sys.argv = ["train.py", "--output-dir", str(folder), *flags]
    train.main()


def kill(process, folder, number):
    """Send the signal about while a file is saved."""
    saves, before = random.randint(1, 8), set()  # three in an epoch
    while process.is_alive() and saves > 0:
        time.sleep(0.0005)
        parts = set(folder.glob(".*.part"))
        saves, before = saves - len(parts - before), parts
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
    process.join()
    assert process.exitcode in (0, -number, 128 + number)


@pytest.mark.slow
def test_killed_runs_end_bit_for_bit_like_one_left_alone(data_dir, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def start(folder):
        process = context.Process(target=run_in, args=(folder, data_dir))
        process.start()
        return process

    alone, killed = tmp_path / "alone", tmp_path / "killed"
    start(alone).join()
    for number in 3 * [signal.SIGKILL] + [signal.SIGTERM, signal.SIGINT]:
        process = start(killed)
        kill(process, killed, number)
        for path in killed.glob("*.pt"):
            load_checkpoint(path)  # whole
    start(killed).join()
    for name in ("last.pt", "best.pt"):
        assert_identical(state_of(killed, name), state_of(alone, name))
    names = {path.name for path in killed.iterdir() if path.name[:9] != "previous-"}
    assert names == {path.name for path in alone.iterdir()}
