"""The benchmarks' saved figures, and what they measure with."""

import importlib
import statistics
import sys

import pytest
import results
import torch
from conftest import ROOT

import train
from model import MAX_PARAMETERS, SHIPPED_CHECKPOINT, load_checkpoint

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def table_of(monkeypatch, capsys):
    def run(name):
        monkeypatch.setattr(sys, "argv", [name, "--table"])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.csv")))
def test_saved_figures_are_printed_and_say_where_they_are_from(table_of, name):
    rows = results.read(FOLDER / f"{name}.csv")
    lines = [line for line in table_of(name).splitlines() if line.startswith("|")]
    assert len(lines) > len(rows) + 1
    assert all(row["commit"] and row["machine"] for row in rows)


def test_a_row_takes_the_place_of_one_alike(tmp_path, capsys):
    path = tmp_path / "a.csv"
    for name, share in (("a", 0.5), ("b", 0.25), ("a", 0.125)):
        results.add(path, dict(name=name, share=share), "name")
    rows = results.read(path)
    results.print_table(rows, dict(name=("", "code"), share=("of all", ".1%")), ("name", "b"))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines == ["| `a` | 12.5% |", "| **`b`** | **25.0%** |"]


def test_the_readmes_give_the_figures_of_the_record(table_of):
    command = "python train.py --recipe record --compile"
    runs = [row for row in results.read(FOLDER / "seeds.csv") if row["command"] == command]
    accuracies = [100 * float(row["test_accuracy"]) for row in runs]
    assert len({row["seed"] for row in runs}) == len(runs)
    figure = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %"
    assert figure in table_of("seeds")
    assert f"**{figure} test accuracy with" in (ROOT / "README.md").read_text()
    assert figure in (FOLDER / "README.md").read_text()


def test_the_shipped_checkpoint_is_the_first_seed_of_the_record_at_its_last_epoch():
    from seeds import command_of

    checkpoint = load_checkpoint(SHIPPED_CHECKPOINT)[1]
    assert command_of(checkpoint["train_config"]) == "python train.py --recipe record --compile"
    assert checkpoint["train_config"]["seed"] == 0
    assert checkpoint["epoch"] == train.RECIPES["record"]["epochs"]


def test_the_default_heatmap_won_on_training_images_and_beats_the_baselines_on_test_images():
    module = pytest.importorskip("faithfulness", exc_type=SystemExit)
    layers = module.default_layers(load_checkpoint(SHIPPED_CHECKPOINT)[0])
    default = module.method_name(module.METHOD, layers)
    table = results.read(FOLDER / "faithfulness.csv")
    candidates = [row for row in table if (row["split"], row["kind"]) == ("training", "candidate")]
    # Grad-CAM++ shows nearly the same map for all classes.
    candidates = [row for row in candidates if not row["map"].startswith("gradcam++")]
    assert max(candidates, key=module.merit)["map"] == default
    (ours,) = [row for row in table if (row["split"], row["map"]) == ("test", default)]
    for row in table:
        if (row["split"], row["kind"]) == ("test", "baseline"):
            assert module.merit(ours) > module.merit(row), row["map"]


def test_the_peers_are_as_small_and_the_resnet_trains_by_its_own_recipe(small_data):
    import peers

    for name, build in peers.PEERS.items():
        assert sum(p.numel() for p in build().parameters()) <= MAX_PARAMETERS, name
    settings = dict(data_dir=str(small_data), train_size=100, val_size=0, batch_size=50)
    run = peers.start(peers.CUTOUT, epochs=1, **settings)
    before = [p.clone() for p in run.model.parameters()]
    peers.fit({"peer": run}, 1)
    assert type(run.optimizers[0]) is torch.optim.SGD
    assert not any(map(torch.equal, before, run.model.parameters()))


def test_a_planted_mark_is_where_its_mask_says_and_shares_are_measured_there():
    from ground_truth import make_marks, plant, share_on

    marks = make_marks(torch.Generator().manual_seed(0))
    images = torch.full((1, 1, 28, 28), 9, dtype=torch.uint8)
    planted, mask = plant(images, marks, torch.tensor([7]), torch.tensor([[10, 5]]))
    assert torch.equal(planted[0, 0, 10:14, 5:9], marks[7])
    assert mask.sum() == 16 and (planted[:, 0][~mask] == 9).all()
    maps = torch.zeros(1, 28, 28)
    maps[0, 10, 8], maps[0, 9, 9] = 3.0, 1.0
    assert share_on(maps, mask) == pytest.approx(0.75)


def test_the_nearest_image_gives_alarms_and_lowest_confidence_as_many():
    from similar import distances_of_classes, figures

    labels, answers = torch.tensor([1, 0, 2, 3, 4]), torch.tensor([1, 1, 2, 2, 4])
    neighbours = torch.tensor([1, 0, 2, 2, 5])  # alarms for the second and the last
    probabilities = torch.zeros(5, 10)
    probabilities[range(5), answers] = torch.tensor([0.4, 0.9, 0.8, 0.5, 0.7])
    expected = dict(right=0.6, model_right=0.6, alarms=2, exposed=0.5, false_alarms=1 / 3)
    # The least confident: the first, which is right, and the fourth, which is wrong.
    expected["exposed_by_confidence"] = 0.5
    assert figures(neighbours, probabilities, labels) == pytest.approx(expected)
    known = torch.arange(20.0)[:, None] ** 2
    found = distances_of_classes(torch.tensor([[0.0], [400.0]]), known, torch.arange(20) % 10)
    assert found[0].tolist() == [i**2 for i in range(10)]
    assert found[1].tolist() == [400 - (10 + i) ** 2 for i in range(10)]
