"""The benchmarks' saved figures, and what they measure with."""

import importlib
import statistics
import sys

import pytest
import results
import torch
from conftest import ROOT

import train
from model import SHIPPED_CHECKPOINT, load_checkpoint

pytest.importorskip("cv2", exc_type=ImportError)  # libGL.so.1 may be missing
import ablations
import faithfulness
import ground_truth as truth
import label_errors
import peers
import robustness
import seeds
import similar

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
    assert len(lines) == len(rows) + 2
    assert all(row["commit"] and row["machine"] for row in rows)


def test_a_row_replaces_one_alike_and_comes_last(tmp_path, capsys):
    path = tmp_path / "a.csv"
    for name, share in (("a", 0.5), ("b", 0.25), ("a", 0.125)):
        results.add(path, dict(name=name, share=share), "name")
    results.print_table(results.read(path))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["| name | share |", "|---|---:|", "| b | 0.25 |", "| a | 0.125 |"]


def test_an_experiment_without_flags_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablations.py"])
    monkeypatch.setattr(results, "set_threads", lambda: None)
    with pytest.raises(SystemExit, match=r"^ablations\.py: error: an experiment needs --group"):
        ablations.main()


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
    checkpoint = load_checkpoint(SHIPPED_CHECKPOINT)[1]
    config = checkpoint["train_config"]
    assert seeds.command_of(config) == "python train.py --recipe record --compile"
    assert config["seed"] == 0 and checkpoint["epoch"] == train.RECIPES["record"]["epochs"]


def test_the_default_heatmap_won_on_training_images_and_beats_others_on_test_images(shipped):
    table = results.read(FOLDER / "faithfulness.csv")
    best = str(faithfulness.default_of(shipped))
    for split in ("training", "second look"):
        assert faithfulness.winner([row for row in table if row["split"] == split]) == best
    test = {row["map"]: row for row in table if row["split"] == "test"}
    shares = {name: float(row["beats_chance"]) for name, row in test.items()}
    assert max(shares, key=shares.get) == best


def test_the_rule_for_the_default_heatmap_on_paper():
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


def test_the_area_under_a_curve_on_paper(monkeypatch):
    def whiteness(model, images):
        """The probability of class 0 is the share of white pixels."""
        share = images.double().mean(dim=(1, 2, 3)) / 255
        return torch.stack([share, 1 - share], dim=1)

    monkeypatch.setattr(faithfulness, "classify", whiteness)
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    images[:, :, :14] = 255
    maps = torch.zeros(2, 28, 28)
    maps[0, :14] = 1  # the white half turns black first: 1/2, 1/4, 0, 0, 0
    maps[1, 14:] = 1  # and last: 1/2, 1/2, 1/2, 1/4, 0
    classes = torch.zeros(2, dtype=torch.long)
    areas = faithfulness.curve(None, images, images * 0, classes, maps)
    torch.testing.assert_close(areas, torch.tensor([0.125, 0.375]), atol=3e-3, rtol=0)


@pytest.mark.parametrize("side, outside", [(8, 0), (16, 8)])
def test_a_square_of_each_image_is_black(side, outside):
    images, generator = torch.ones(500, 1, 28, 28), torch.Generator().manual_seed(0)
    black = robustness.fill_square(images, generator, side, outside)[:, 0] == 0
    rows, columns = black.any(dim=2).int(), black.any(dim=1).int()
    assert torch.equal(black.int(), rows[:, :, None] * columns[:, None])
    for line in (rows, columns):
        assert line.sum(dim=1).max() == side
        for before in (line, line.flip(1)):
            assert before.argmax(dim=1).max() == 28 - side + outside


def test_the_peers_are_as_small_and_the_resnet_trains_by_its_own_recipe(small_data):
    for name, build in peers.PEERS.items():
        assert sum(p.numel() for p in build().parameters()) <= 600_000, name
    settings = dict(data_dir=str(small_data), val_size=0, epochs=1)
    run = peers.start(peers.CUTOUT, precision="float32", device="cpu", **settings)
    before = [p.clone() for p in run.model.parameters()]
    peers.fit({"peer": run}, 1)
    assert type(run.optimizers[0]) is torch.optim.SGD
    assert not any(map(torch.equal, before, run.model.parameters()))


def test_planted_marks_are_where_their_masks_say_and_maps_are_measured_there():
    labels, patterns, places = truth.draw(50, seed=0)
    assert (labels == 3 * patterns[:, 0] + patterns[:, 1] - 3).all()
    marks = truth.make_patterns()[patterns]
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
    def moved(x, labels):
        maps = torch.zeros(len(x), 28, 28)
        is_noisy = x.flatten(1).any(dim=1)
        maps[is_noisy, 0, 0], maps[~is_noisy, 5, 5] = 1.0, 1.0
        return maps

    x, labels = torch.zeros(2, 1, 28, 28), torch.zeros(2)
    assert truth.max_sensitivity(moved, x, labels).item() == pytest.approx(2**0.5)
    assert truth.max_sensitivity(lambda x, y: torch.ones(len(x), 28, 28), x, labels) == 0


def test_known_wrong_labels_are_looked_for_among_the_most_confident_errors():
    index = torch.tensor([7, label_errors.KNOWN[0], 9, label_errors.KNOWN[1]])
    row = label_errors.ranking("the model", index, torch.tensor([0.9, 0.5, 0.4, 0.8]))
    assert (row["images"], row["known"], row["ranks"]) == (4, 2, "2 3")


def test_the_nearest_images_give_alarms_and_lowest_confidence_as_many():
    labels, answers = torch.tensor([1, 0, 2, 3, 4]), torch.tensor([1, 1, 2, 2, 4])
    others = torch.tensor([5, 0, 5, 3, 5])  # the second likeliest
    probabilities = torch.zeros(5, 10).scatter(1, others[:, None], 0.1)
    probabilities[range(5), answers] = torch.tensor([0.4, 0.7, 0.9, 0.5, 0.8])
    distances = torch.arange(10.0).expand(5, 10).clone()
    distances[4, 5] = 3.0  # alarms for the second and the last
    # The least confident: the first, which is right, and the fourth, which is wrong.
    expected = dict(alarms=2, exposed=0.5, false_alarms=1 / 3, exposed_by_confidence=0.5)
    found = similar.figures(probabilities, distances, labels)
    assert {name: figure.item() for name, figure in found.items()} == pytest.approx(expected)
    known = torch.arange(20.0)[:, None] ** 2
    points, labels = torch.tensor([[0.0], [400.0]]), torch.arange(20) % 10
    found = similar.distances_of_classes(points, known, labels)
    assert found[0].tolist() == [i**2 for i in range(10)]
    assert found[1].tolist() == [400 - (10 + i) ** 2 for i in range(10)]
