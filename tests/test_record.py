"""The plan of the next record: its order, its choices, and what is not looked at."""

import sys
from pathlib import Path

import pytest
import record
from conftest import assert_identical


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Runs the script with steps that only write a history; returns what was done, in order."""
    losses = dict(large=0.3, wide_resnet=0.2, as_today=0.4, warm=0.1)
    done = []

    def step(config, **_):
        name, epochs = Path(config.output_dir).name, config.epochs
        done.append(name)
        row = dict(val_loss=losses.get(name, 0.5))
        Path(name).mkdir(exist_ok=True)
        record.write_history([row] * epochs, Path(name, "history.csv"))

    monkeypatch.setattr(record.train, "train", step)
    monkeypatch.setattr(record, "train_peer", step)
    monkeypatch.setattr(record, "test", lambda _: done.append("test"))
    monkeypatch.setattr(record.signal, "alarm", lambda _: None)
    monkeypatch.setattr(record.signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def run():
        done.clear()
        monkeypatch.setattr(sys, "argv", ["record.py", "--tiny", "--folder", str(tmp_path)])
        record.main()
        return list(done)

    return run


def test_the_steps_have_an_order_and_none_is_repeated_and_the_test_comes_last(play):
    order = play()
    teachers = ["large", "wide_resnet", "as_today"]
    assert order[:3] == teachers
    assert order[-9:-2] == ["teacher_0", "teacher_1", *(f"final_{i}" for i in range(5))]
    assert order[-2:] == [record.PEER, "test"]
    assert len(set(order)) == len(order)
    Path("upright/history.csv").unlink()
    assert play() == ["upright", "test"]


def test_the_lowest_validation_loss_is_carried_on(play):
    assert "--teacher large/last.pt" in record.make_plan(record.TINY)["warm"]
    play()
    steps = record.make_plan(record.TINY)
    assert "--teacher wide_resnet/last.pt" in steps["as_record"]
    assert "--depth 0" in steps["teacher_1"]
    for name in ("upright", "final_4"):
        assert "--temperature 2" in steps[name]
    config = record.config_of(steps["final_4"], seed=0)  # for plans without a seed
    assert (config.val_size, config.seed, config.rotate) == (0, 4, 15.0)


def test_the_peer_goes_on_bit_for_bit(small_data, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    # Else a busy machine may choose another precision in between.
    flags = "--val-size 0 --train-size 200 --epochs 2 --precision float32 --threads 1 --device cpu"
    config = record.config_of(flags, data_dir=str(small_data), output_dir=str(tmp_path / "whole"))
    record.train_peer(config)
    config.output_dir = str(tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record, "write_history", stop)
        record.train_peer(config)
    record.train_peer(config)
    weights = [record.torch.load(tmp_path / name / "run.pt")[0] for name in ("whole", "parts")]
    assert_identical(*map(dict, weights))
