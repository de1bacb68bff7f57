"""Damaged and hostile checkpoints, disks that fill, a run killed in a save; two of the benchmarks try far more."""

import random
import resource
from collections import Counter

import hostile
import kill_resume
import pytest
import torch

from common.files import UserError
from model import CheckpointError, load_checkpoint, save_checkpoint


@pytest.fixture
def good(tmp_path):
    """A small checkpoint."""
    hostile.make_checkpoint(tmp_path / "good.pt")
    return tmp_path / "good.pt"


def test_a_damaged_checkpoint_is_refused_or_has_the_same_weights(good):
    ends = Counter(happened for _, _, happened in hostile.mutated_checkpoints(good, copies=60))
    assert ends.keys() == {"refused", "fine"} and ends["refused"] > 50


@pytest.mark.parametrize("name, value", [("num_heads", 0), ("stem_dims", (4, 8, 9)), ("mlp_ratio", float("inf"))])
def test_a_checkpoint_of_an_impossible_model_is_refused(good, name, value):
    content = torch.load(good, weights_only=True)
    good.write_bytes(hostile.saved(content | dict(model_config=content["model_config"] | {name: value})))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_checkpoint(good)


def test_code_in_a_checkpoint_is_never_run(good, tmp_path):
    content, touched = torch.load(good, weights_only=True), tmp_path / "touched"
    good.write_bytes(hostile.saved(content | dict(trap=hostile.Trap(touched))))
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        load_checkpoint(good)
    assert not touched.exists()
    torch.load(good, weights_only=False)
    assert touched.exists()  # the trap is real


def test_a_disk_that_fills_up_in_a_save_leaves_the_earlier_checkpoint(good):
    model, before = load_checkpoint(good)[0], good.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(0, len(before) - 1, 3000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            with pytest.raises(UserError, match="cannot write"):
                save_checkpoint(good, model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert good.read_bytes() == before and list(good.parent.iterdir()) == [good]


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_saves_ends_like_one_left_alone(data_dir, tmp_path):
    alone, killed, generator = tmp_path / "alone", tmp_path / "killed", random.Random(0)
    flags = ("--data-dir", data_dir, "--threads", 1)
    kill_resume.finish(kill_resume.start(alone, *flags))
    for _ in range(3):
        process = kill_resume.start(killed, *flags)
        assert kill_resume.kill(process, killed, kill_resume.IN_A_SAVE, generator, seconds=0)
    kill_resume.finish(kill_resume.start(killed, *flags))
    assert kill_resume.state(killed) == kill_resume.state(alone)
