"""Damaged, foreign and hostile input, full disks and killed runs: the cases of the two benchmarks that list them."""

import random
import shutil
import sys

import hostile
import kill_resume
import pytest
import torch
from conftest import ROOT

import dataset
import train
from model import CheckpointError, load_checkpoint


@pytest.fixture
def good(tmp_path):
    """A small checkpoint of this project."""
    hostile.make_checkpoint(tmp_path / "good.pt")
    return tmp_path / "good.pt"


def peak_of(code: str) -> list[int]:
    """What a fresh process prints that begins with `peak`, a function for the most memory it has had, in MiB."""
    prelude = "import resource, sys; sys.path.append('benchmarks'); import hostile\n"
    prelude += "unit = 1 << (20 if sys.platform == 'darwin' else 10)\n"
    prelude += "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit\n"
    outcome = hostile.start(sys.executable, "-c", prelude + code, cwd=ROOT)
    assert outcome.status == 0, outcome.errors
    return [int(number) for number in outcome.output.split()]


def test_bad_checkpoints_are_refused_in_one_line_and_run_nothing(good, tmp_path):
    cases = list(hostile.bad_checkpoints(good, tmp_path))
    assert len(cases) > 50
    for name, path in cases:
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
            pytest.fail(f"{name} was loaded")
        message = str(error.value)
        assert message.startswith(f"{path} ") and "\n" not in message and len(message) < len(str(path)) + 300, name
        assert any(advice in message for advice in ("name a", "name one", "use a", "train again")), name
    assert not (tmp_path / "touched").exists()


def test_the_traps_of_these_checkpoints_are_real(good, tmp_path):
    _, path = next(case for case in hostile.bad_checkpoints(good, tmp_path) if case[0] == "a checkpoint that runs code")
    torch.load(path, weights_only=False)
    assert (tmp_path / "touched").exists()


def test_small_checkpoints_that_ask_for_much_memory_get_none(good, tmp_path):
    greedy = ("GiB", "MiB", "billion", "million", "thousand", "only torch")
    paths = [
        str(path) for name, path in hostile.bad_checkpoints(good, tmp_path) if any(word in name for word in greedy)
    ]
    assert len(paths) == 9
    before, after = peak_of(
        f"""
hostile.load_checkpoint({str(good)!r})
print(peak())
for path in {paths!r}:
    try:
        hostile.load_checkpoint(path)
    except hostile.CheckpointError:
        pass
print(peak())"""
    )
    assert after - before < 200


@pytest.mark.parametrize("resealed, number", [(False, 1200), (True, 300)])
def test_a_mutated_checkpoint_is_refused_or_has_the_same_weights(good, resealed, number):
    refused, loaded = hostile.fuzz(good, number, resealed, seed=1)
    assert refused > 0 and loaded > 0 and refused + loaded == number


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs train.py in this process with some flags, and returns the one line that it refuses them with."""

    def run(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main()
        said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.strip()
        assert said.startswith("train.py: error: ") and "\n" not in said
        return said

    return run


def test_a_run_is_not_resumed_from_a_position_that_is_not_its_own(run_config, refusal, tmp_path):
    train.train(run_config())
    before = load_checkpoint(tmp_path / "run" / "last.pt")[1]["history"]
    cases = list(hostile.bad_positions(tmp_path))
    assert len(cases) > 10
    for _, path in cases:
        refusal("--resume", "--output-dir", path)
    assert load_checkpoint(tmp_path / "run" / "last.pt")[1]["history"] == before


@pytest.mark.parametrize("name", train.RANGES)
def test_every_number_is_checked_before_any_data_is_loaded(refusal, monkeypatch, data_dir, name):
    monkeypatch.setattr(dataset, "load", lambda *_: pytest.fail("the data was loaded"))
    low, high = train.RANGES[name]
    default, text = train.DEFAULTS[name]
    several = isinstance(default, tuple)
    flag = f"--{name.replace('_', '-')}"
    for bad in (0, -1, float("nan"), "many", high + 1, low - 1):
        if isinstance(bad, int | float) and low <= bad <= high:
            continue
        others = ["1"] * (len(default) - 1) if several else []
        given = [flag, *others, bad] if several else [f"{flag}={bad}"]
        said = [refusal(*given)]
        # The same as an edited default.
        monkeypatch.setitem(train.DEFAULTS, name, ((*default[1:], bad) if several else bad, text))
        said.append(refusal())
        monkeypatch.setitem(train.DEFAULTS, name, (default, text))
        assert all(flag in line and f"from {low:,} to {high:,}" in line for line in said)


def test_a_default_that_was_edited_to_a_whole_number_takes_fractions_still(monkeypatch):
    monkeypatch.setitem(train.DEFAULTS, "warmup_epochs", (1, ""))
    assert vars(train.parse_flags(["--warmup-epochs", "0.5"])[1]) == {"warmup_epochs": 0.5}


def test_a_full_disk_leaves_the_earlier_checkpoints_whole(run_config, tmp_path):
    with hostile.mounted(tmp_path / "disk", "size=4m") as disk:
        if disk is None:
            pytest.skip("no small disk can be mounted here: that takes root's rights")
        config = run_config(output_dir=str(disk / "run"), epochs=1)
        train.train(config)
        before = [(disk / "run" / name).read_bytes() for name in ("best.pt", "last.pt")]
        hostile.fill(disk, left=100_000)
        with pytest.raises(train.TrainingError, match="No space left on device; make room"):
            train.train(config)
        assert [(disk / "run" / f"previous-1-{name}").read_bytes() for name in ("best.pt", "last.pt")] == before
        assert not hostile.strays(disk)
        hostile.remount(disk, "ro")
        with pytest.raises(train.TrainingError, match="Read-only"), train.claim(disk / "run"):
            pass


def test_a_folder_that_is_deleted_meanwhile_is_made_anew(run_config, tmp_path, monkeypatch, capsys):
    write_history = train.write_history

    def write_and_delete(history, output_dir):
        write_history(history, output_dir)
        if len(history) == 1:
            shutil.rmtree(output_dir)

    monkeypatch.setattr(train, "write_history", write_and_delete)
    train.train(run_config(epochs=3))
    assert f"{tmp_path / 'run'} was removed; making it anew" in capsys.readouterr().err
    assert len(load_checkpoint(tmp_path / "run" / "last.pt")[1]["history"]) == 3
    assert load_checkpoint(tmp_path / "run" / "best.pt")[1]["epoch"] > 1


def test_a_run_has_its_folder_to_itself(refusal, tmp_path):
    with train.claim(tmp_path / "run"):
        said = refusal("--output-dir", tmp_path / "run")
    assert "another run is writing to" in said and "--output-dir" in said
    with train.claim(tmp_path / "run"):  # it is free again
        pass


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path):
    target, left = tmp_path / "a.txt", tmp_path / ".a.txt.12345678.part"
    left.write_bytes(b"half")
    with dataset.whole_file(target) as first:
        assert not left.exists()
        first.write(b"first")
        with dataset.whole_file(target) as second:
            second.write(b"second")
        assert target.read_bytes() == b"second"
    assert target.read_bytes() == b"first"
    with pytest.raises(ValueError), dataset.whole_file(target) as third:
        third.write(b"half")
        raise ValueError
    assert target.read_bytes() == b"first" and list(tmp_path.iterdir()) == [target]


def test_a_run_that_is_killed_before_its_best_checkpoint_is_saved_makes_it_again(run_config, tmp_path):
    train.train(run_config(val_size=0))
    best = tmp_path / "run" / "best.pt"
    whole = load_checkpoint(best)[1]["model"]
    best.unlink()
    train.train(run_config(val_size=0), resume=True)
    again = load_checkpoint(best)[1]["model"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_that_is_killed_while_it_saves_ends_like_one_left_alone(data_dir, tmp_path):
    kill_resume.finish(data_dir, tmp_path / "alone")
    generator = random.Random(0)
    run = tmp_path / "killed"
    for number in (1, 2, 4):  # in the first save of all, between position and best checkpoint, and in a later epoch
        process = kill_resume.start(data_dir, run)
        assert kill_resume.kill_in_save(process, run, number, generator.choice((0, 0.002)))
        process.communicate()
        kill_resume.check_folder(run)
    kill_resume.finish(data_dir, run)
    assert kill_resume.difference(kill_resume.state(tmp_path / "alone"), kill_resume.state(run)) is None
    assert not kill_resume.temporary_files(run)
