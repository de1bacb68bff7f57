"""Damaged, foreign and hostile input, full disks and killed runs: the cases of the two benchmarks that list them."""

import os
import random
import shutil
import subprocess
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


@pytest.mark.parametrize("name, value", [("stem_dims", 5), ("lr", [0.01]), ("epochs", "30"), ("flip", 1)])
def test_a_default_that_was_edited_to_another_kind_is_refused(refusal, monkeypatch, name, value):
    monkeypatch.setitem(train.DEFAULTS, name, (value, ""))
    assert name in refusal().replace("--", "").replace("-", "_")


def test_a_recipe_that_sets_what_is_no_default_is_refused(refusal, monkeypatch):
    monkeypatch.setitem(train.RECIPES, "fast", dict(epoch=3))
    assert "sets epoch," in refusal("--recipe", "fast")


@pytest.mark.parametrize("flag", ["--output-dir", "--teacher", "--evaluate"])
@pytest.mark.parametrize("value", ["a" * 300, "ring", "a\nb"])
def test_a_name_that_cannot_be_is_refused_and_leaves_nothing(refusal, monkeypatch, tmp_path, flag, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring").symlink_to("ring")
    if (flag, value) == ("--output-dir", "a\nb"):  # this one can be
        value = "ring/a\nb"
    said = refusal(flag, value)
    assert any(f"{advice} " in said for advice in ("name", "choose"))
    assert list(tmp_path.iterdir()) == [tmp_path / "ring"]


def test_a_refused_run_leaves_no_new_folder(tmp_path):
    with pytest.raises(ValueError), train.claim(tmp_path / "a" / "b"):
        raise ValueError
    assert not list(tmp_path.iterdir())
    (tmp_path / "own").mkdir()
    with pytest.raises(ValueError), train.claim(tmp_path / "own"):
        raise ValueError
    assert list(tmp_path.iterdir()) == [tmp_path / "own"]


def test_a_machine_without_a_compiler_is_told_so(run_script, data_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache")
    )  # what an earlier run has compiled is not here
    flags = ["--compile", "--data-dir", data_dir, "--output-dir", tmp_path / "run", *hostile.SHORT_RUN]
    result = run_script("train.py", *flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "train.py: error: --compile does not work here" in result.stderr and "--no-compile" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_reader_that_leaves_ends_the_script_in_one_line(good, data_dir):
    command = [sys.executable, ROOT / "train.py", "--evaluate", good, "--data-dir", data_dir]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1
    assert said == "train.py: error: what reads the output has ended: let it read to the end, or write to a file\n"


def test_weights_that_give_no_finite_answer_are_refused(good, refusal, data_dir):
    model = load_checkpoint(good)[0]
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    train.save_checkpoint(good, model)
    assert "not finite" in refusal("--evaluate", good, "--data-dir", data_dir)
    assert [path.name for path in good.parent.iterdir()] == ["good.pt"]


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


@pytest.mark.parametrize("write", [1, 2, 3, 4, 5])  # position, best checkpoint, history; then of the second epoch
def test_a_folder_that_is_deleted_during_a_write_is_made_anew_and_locked_again(
    run_config, tmp_path, monkeypatch, capsys, write
):
    run, writes, fsync = tmp_path / "run", [], os.fsync

    def delete_and_sync(handle):
        writes.append(handle)
        if len(writes) == write:
            shutil.rmtree(run)
        fsync(handle)

    monkeypatch.setattr(dataset.os, "fsync", delete_and_sync)
    with train.claim(run):
        train.train(run_config(val_size=0))
        with pytest.raises(train.TrainingError, match="another run"), train.claim(run):
            pass
    assert f"{run} was removed; making it anew" in capsys.readouterr().err
    assert len(load_checkpoint(run / "last.pt")[1]["history"]) == load_checkpoint(run / "best.pt")[1]["epoch"] == 2
    assert len((run / "history.csv").read_text().splitlines()) == 3
    assert {path.name for path in run.iterdir()} == {"last.pt", "best.pt", "history.csv"}


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


def kill_before_best(monkeypatch, epoch):
    """Make a run end between the position of an epoch and its best checkpoint."""
    save_checkpoint = train.save_checkpoint

    def save(path, model, **contents):
        if path.name == "best.pt" and contents["epoch"] == epoch:
            raise KeyboardInterrupt
        save_checkpoint(path, model, **contents)

    monkeypatch.setattr(train, "save_checkpoint", save)


def test_a_run_that_is_killed_before_its_best_checkpoint_is_saved_makes_it_again(run_config, tmp_path, monkeypatch):
    best = train.train(run_config(val_size=0, output_dir=str(tmp_path / "whole")))
    whole, killed = load_checkpoint(best)[1]["model"], tmp_path / "run" / "best.pt"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_before_best(patch, epoch=2)
        train.train(run_config(val_size=0))
    assert load_checkpoint(killed)[1]["epoch"] == 1
    train.train(run_config(val_size=0), resume=True)
    again = load_checkpoint(killed)[1]
    assert again["epoch"] == 2 and all(torch.equal(whole[name], again["model"][name]) for name in whole)


def test_the_best_of_what_is_left_is_kept_where_a_person_moved_the_best_checkpoint_away(
    run_config, tmp_path, monkeypatch
):
    best = tmp_path / "run" / "best.pt"
    accuracies = iter(number for val in (0.5, 0.3, 0.4, 0.35) for number in (0.1, val))  # after each of the training
    monkeypatch.setattr(train, "accuracy_score", lambda *_: next(accuracies))
    write_history = train.write_history

    def write_and_move(history, path):
        write_history(history, path)
        if len(history) == 1:
            best.unlink()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "write_history", write_and_move)
        kill_before_best(patch, epoch=3)
        train.train(run_config(epochs=4))
    assert load_checkpoint(best)[1]["epoch"] == 2
    train.train(run_config(epochs=4), resume=True)
    assert load_checkpoint(best)[1]["epoch"] == 3


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
