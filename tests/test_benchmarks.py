"""The benchmarks' saved figures, and what they measure with."""

import importlib
import statistics
import sys

import pytest
import results
import torch
from conftest import ROOT

import dataset
import train
from model import SHIPPED_CHECKPOINT, load_checkpoint

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


@pytest.fixture
def faithfulness():
    return pytest.importorskip("faithfulness", exc_type=SystemExit)  # OpenCV cannot be loaded


def test_the_best_heatmap_won_on_training_images_and_beats_the_baselines_on_test_images(
    faithfulness,
):
    table = results.read(FOLDER / "faithfulness.csv")
    layers = faithfulness.default_layers(load_checkpoint(SHIPPED_CHECKPOINT)[0])
    best = faithfulness.candidate_name(faithfulness.METHOD, faithfulness.LOG_ODDS, layers, False)
    for split in ("training", "second look"):
        assert faithfulness.winner([row for row in table if row["split"] == split]) == best
    test = {row["map"]: row for row in table if row["split"] == "test"}
    shares = {name: float(row["beats_chance"]) for name, row in test.items()}
    assert max(shares, key=shares.get) == best


def test_the_rule_for_the_default_heatmap_on_paper(faithfulness):
    names = "map", "beats_chance", "beats_chance_error", "merit", "other_class"
    lines = [
        ("the same for all classes", "0.9", "0.02", "0.5", "0.7"),
        ("first", "0.80", "0.03", "0.1", "-0.2"),
        ("within its error", "0.78", "0.01", "0.2", "0.5"),
        ("outside of it", "0.76", "0.05", "0.3", "0.5"),
        ("a baseline", "0.95", "0.01", "0.3", ""),
    ]
    rows = [dict(zip(names, line, strict=True)) for line in lines]
    assert faithfulness.winner(rows) == "within its error"


class Whiteness(torch.nn.Module):
    """The probability of class 0 is the share of white pixels."""

    data = dataset.FASHION_MNIST

    def forward(self, x):
        share = (x * self.data.std + self.data.mean).mean(dim=(1, 2, 3))
        return torch.stack([share, 1 - share], dim=1).log()


def test_the_area_under_a_curve_on_paper(faithfulness):
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    images[:, :, :14] = 255
    maps = torch.zeros(2, 28, 28)
    maps[0, :14] = 1  # the white half turns black first: 1/2, 1/4, 0, 0, 0
    maps[1, 14:] = 1  # and last: 1/2, 1/2, 1/2, 1/4, 0
    classes = torch.zeros(2, dtype=torch.long)
    areas = faithfulness.curve(Whiteness(), images, images * 0, classes, maps)
    torch.testing.assert_close(areas, torch.tensor([0.125, 0.375]), atol=3e-3, rtol=0)


def test_the_peers_are_as_small_and_the_resnet_trains_by_its_own_recipe(small_data):
    import peers

    for name, build in peers.PEERS.items():
        assert sum(p.numel() for p in build().parameters()) <= 600_000, name
    settings = dict(data_dir=str(small_data), train_size=100, val_size=0, batch_size=50)
    run = peers.start(peers.CUTOUT, epochs=1, precision="float32", device="cpu", **settings)
    before = [p.clone() for p in run.model.parameters()]
    peers.fit({"peer": run}, 1)
    assert type(run.optimizers[0]) is torch.optim.SGD
    assert not any(map(torch.equal, before, run.model.parameters()))


def test_planted_marks_are_where_their_masks_say_and_maps_are_measured_there():
    import ground_truth as truth

    labels, patterns, places = truth.draw(50, torch.Generator().manual_seed(0))
    assert (labels == 3 * patterns[:, 0] + patterns[:, 1] - 3).all()
    marks = truth.make_patterns(torch.Generator().manual_seed(0))[patterns]
    planted, masks = truth.plant(torch.full((50, 1, 28, 28), 9).byte(), marks, places)
    for i, mask in enumerate(masks):
        assert torch.equal(planted[:, 0][mask].view(50, 4, 4), marks[:, i])
    assert masks.sum(dim=0).max() == 1 and (planted[:, 0][~masks.any(dim=0)] == 9).all()

    maps = torch.zeros(50, 28, 28)
    maps[masks[0]] = 3.0
    maps[:, 13, 13] += 1.0
    assert truth.share_of_hottest(maps, masks[0], 16) == 1
    maps = truth.shares(lambda x, y: x[:, 0], maps[:, None], labels)
    assert (truth.share_on(maps, masks[0]) >= 48 / 49 - 1e-6).all()


def test_the_sensitivity_of_a_map_is_its_largest_change():
    import ground_truth as truth

    def moved(x, labels):
        maps = torch.zeros(len(x), 28, 28)
        is_noisy = x.flatten(1).any(dim=1)
        maps[is_noisy, 0, 0], maps[~is_noisy, 5, 5] = 1.0, 1.0
        return maps

    x, labels = torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.long)
    assert truth.max_sensitivity(moved, x, labels) == pytest.approx(2**0.5)
    assert truth.max_sensitivity(lambda x, y: torch.ones(len(x), 28, 28), x, labels) == 0


def test_known_wrong_labels_are_looked_for_among_the_most_confident_errors():
    import label_errors

    index = torch.tensor([7, label_errors.KNOWN[0], 9, label_errors.KNOWN[1]])
    row = label_errors.ranking("the model", index, torch.tensor([0.9, 0.5, 0.4, 0.8]))
    assert (row["images"], row["known"], row["ranks"]) == (4, 2, "2 3")


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
