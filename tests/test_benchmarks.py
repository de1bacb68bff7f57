"""The benchmarks' saved figures and printed tables, and what they measure with."""

import importlib
import statistics
import sys

import pytest
import results
import torch
from conftest import ROOT

import train
from model import MAX_PARAMETERS, SHIPPED_CHECKPOINT, load_checkpoint
from training.optim import make_optimizers

FOLDER = ROOT / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.csv"))


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs a benchmark's command line in this process and returns what it prints."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *flags])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", NAMES)
def test_saved_figures_are_printed_and_say_where_they_are_from(printed, name):
    rows = results.read(FOLDER / f"{name}.csv")
    table = [line for line in printed(name, "--table").splitlines() if line.startswith("|")]
    assert len([line for line in table if "---" not in line]) > len(rows)
    assert all(row["commit"] and row["machine"] for row in rows)


def test_a_row_is_added_or_takes_the_place_of_one_alike(tmp_path, capsys):
    path = tmp_path / "a.csv"
    for name, share in (("a", 0.5), ("b", 0.25), ("a", 0.125)):
        results.add(path, dict(name=name, share=share, machine="m"), "name")
    rows = results.read(path)
    assert [(row["name"], row["machine"]) for row in rows] == [("a", "m"), ("b", "m")]
    results.print_table(rows, dict(name=("", "code"), share=("of all", ".1%")), ("name", "b"))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines == ["| `a` | 12.5% |", "| **`b`** | **25.0%** |"]


def test_the_readmes_give_the_mean_and_spread_of_the_record(printed):
    command = "python train.py --recipe record --compile"
    runs = [row for row in results.read(FOLDER / "seeds.csv") if row["command"] == command]
    accuracies = [100 * float(row["test_accuracy"]) for row in runs]
    assert len({row["seed"] for row in runs}) == len(runs) >= 3
    assert all(int(row["parameters"]) <= MAX_PARAMETERS for row in runs)
    figure = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %"
    assert figure in printed("seeds", "--table")
    assert f"**{figure} test accuracy with" in (ROOT / "README.md").read_text()
    assert figure in (FOLDER / "README.md").read_text()


def test_the_shipped_checkpoint_is_the_first_seed_of_the_record_at_its_last_epoch():
    from seeds import command_of

    _, checkpoint = load_checkpoint(SHIPPED_CHECKPOINT)
    config, history = checkpoint["train_config"], checkpoint["history"]
    assert command_of(config) == "python train.py --recipe record --compile"
    assert config["seed"] == 0
    assert checkpoint["epoch"] == len(history) == train.RECIPES["record"]["epochs"]


def test_the_default_heatmap_won_on_training_images_and_beats_the_baselines_on_test_images():
    pytest.importorskip("Visulization", reason="OpenCV cannot be loaded", exc_type=SystemExit)
    from faithfulness import METHOD, default_layers, merit, method_name

    default = method_name(METHOD, default_layers(load_checkpoint(SHIPPED_CHECKPOINT)[0]))
    table = results.read(FOLDER / "faithfulness.csv")
    candidates = [row for row in table if (row["split"], row["kind"]) == ("training", "candidate")]
    # Grad-CAM++ shows nearly the same map for all classes.
    candidates = [row for row in candidates if not row["map"].startswith("gradcam++")]
    assert len(candidates) >= 20 and max(candidates, key=merit)["map"] == default
    (ours,) = [row for row in table if (row["split"], row["map"]) == ("test", default)]
    baselines = [row for row in table if (row["split"], row["kind"]) == ("test", "baseline")]
    for row in baselines:
        assert merit(ours) > merit(row), row["map"]
        assert float(ours["deletion_blurred"]) < float(row["deletion_blurred"]), row["map"]


def test_the_peers_have_as_few_parameters_and_both_optimizers():
    from peers import PEERS, multiply_adds

    for name, build in PEERS.items():
        model = build()
        assert sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS, name
        adamw, muon = make_optimizers(model, "muon", 0.05)
        assert any(p is model.head.weight for p in adamw.param_groups[0]["params"]), name
        assert muon.param_groups[0]["params"], name
    layers = torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(3 * 784, 4)
    assert multiply_adds(torch.nn.Sequential(*layers)) == 9 * 3 * 784 + 4 * 3 * 784


def test_a_planted_mark_is_where_its_mask_says_and_shares_are_measured_there():
    from ground_truth import make_marks, plant, share_on

    marks = make_marks(torch.Generator().manual_seed(0))
    assert marks.flatten(1).float().mean(dim=1).tolist() == [127.5] * 10
    images = torch.full((2, 1, 28, 28), 9, dtype=torch.uint8)
    places = torch.tensor([[0, 24], [10, 5]])
    planted, mask = plant(images, marks, torch.tensor([3, 7]), places)
    assert torch.equal(planted[0, 0, :4, 24:], marks[3])
    assert torch.equal(planted[1, 0, 10:14, 5:9], marks[7])
    assert mask.sum(dim=(1, 2)).tolist() == [16, 16] and (planted[:, 0][~mask] == 9).all()
    maps = torch.zeros(2, 28, 28)
    maps[0, 1, 25], maps[0, 9, 9], maps[1, 10, 8] = 3.0, 1.0, 0.5
    assert share_on(maps, mask) == pytest.approx((0.75 + 1) / 2)


def test_cutout_sets_a_square_of_16_pixels_to_mean_grey_that_may_reach_over_the_edge():
    from peers import cutout

    x = cutout(torch.ones(3000, 1, 28, 28), torch.Generator().manual_seed(0))[:, 0]
    gone = x == 0
    heights, widths = gone.any(dim=2).sum(dim=1), gone.any(dim=1).sum(dim=1)
    assert torch.equal(heights * widths, gone.sum(dim=(1, 2)))
    assert heights.max() == widths.max() == 16 and heights.min() == widths.min() == 8


def test_the_resnet_trains_by_its_own_recipe(small_data):
    import peers

    settings = dict(data_dir=str(small_data), train_size=100, val_size=0, batch_size=50)
    run = peers.start(peers.CUTOUT, epochs=1, **settings)
    before = [p.clone() for p in run.model.parameters()]
    peers.fit({"peer": run}, 1)
    assert [type(optimizer) for optimizer in run.optimizers] == [torch.optim.SGD]
    assert run.history[0]["images"] == 100
    assert not any(map(torch.equal, before, run.model.parameters()))
