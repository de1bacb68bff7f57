"""The saved results are read, printed as tables, and agree with the shipped checkpoint and the default heatmap."""

import csv
import importlib
import re
import statistics
import sys

import pytest
import torch
from conftest import ROOT

import train
from model import MAX_PARAMETERS, SHIPPED_CHECKPOINT, load_checkpoint
from training.optim import make_optimizers


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs a benchmark's command line in this process and returns what it prints."""

    def run(name: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


def rows(name: str) -> list[dict[str, str]]:
    with open(ROOT / "benchmarks" / name, newline="") as file:
        return list(csv.DictReader(file))


def test_the_seeds_table_gives_the_mean_and_spread_of_the_record(printed):
    runs = [row for row in rows("seeds.csv") if row["command"] == "python train.py --recipe record --compile"]
    accuracies = [100 * float(row["test_accuracy"]) for row in runs]
    assert len(runs) >= 3 and len({row["seed"] for row in runs}) == len(runs)
    assert all(int(row["parameters"]) <= MAX_PARAMETERS for row in runs)
    figure = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %"
    assert figure in printed("seeds") and f"**{figure} test accuracy with" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["ablations", "peers", "time_to_accuracy"])
def test_saved_results_are_printed_as_tables(printed, name):
    lines = [line for line in printed(name).splitlines() if line.startswith("|")]
    assert len(lines) >= 5 and all(line.endswith("|") for line in lines)
    assert len(re.findall(r"`(python [^`]+)`", "\n".join(lines))) >= 3


def test_the_shipped_checkpoint_is_the_first_seed_of_the_record_at_its_last_epoch():
    from seeds import command_of

    _, checkpoint = load_checkpoint(SHIPPED_CHECKPOINT)
    config, history = checkpoint["train_config"], checkpoint["history"]
    assert (command_of(config), config["seed"]) == ("python train.py --recipe record --compile", 0)
    assert checkpoint["epoch"] == len(history) == config["epochs"] == train.RECIPES["record"]["epochs"]


def test_the_default_heatmap_won_on_training_images_and_beats_the_baselines_on_test_images():
    visulization = pytest.importorskip("Visulization", reason="OpenCV cannot be loaded", exc_type=SystemExit)
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    default = f"{visulization.METHOD} {' + '.join(visulization.default_layers(model))}"
    table = rows("faithfulness.csv")

    def merit(row):
        return float(row["insertion"]) - float(row["deletion"])

    candidates = [row for row in table if (row["split"], row["kind"]) == ("training", "candidate")]
    candidates = [row for row in candidates if not row["map"].startswith("gradcam++")]  # alike for all classes
    assert len(candidates) >= 20 and max(candidates, key=merit)["map"] == default
    (ours,) = [row for row in table if (row["split"], row["map"]) == ("test", default)]
    baselines = [row for row in table if (row["split"], row["kind"]) == ("test", "baseline")]
    assert len(baselines) >= 6 and all(int(row["images"]) >= 1000 for row in table if row["split"] == "test")
    for row in baselines:
        assert merit(ours) > merit(row) and float(ours["insertion"]) > float(row["insertion"]), row["map"]
        assert float(ours["deletion_blurred"]) < float(row["deletion_blurred"]), row["map"]
        # Garments are bright on black: to blacken what is bright, whatever the class, is the better deletion.
        assert float(ours["deletion"]) < float(row["deletion"]) or row["map"] == "the image's brightness", row["map"]


def test_the_peers_take_the_images_and_have_as_few_parameters():
    from peers import PEERS

    for name, build in PEERS.items():
        model = build().eval()
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10), name
        assert sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS, name
        adamw, muon = make_optimizers(model, "muon", 0.05)
        assert any(p is model.head.weight for p in adamw.param_groups[0]["params"]), name
        assert muon.param_groups[0]["params"], name


def test_a_planted_mark_is_where_its_mask_says_and_shares_are_measured_there():
    from ground_truth import make_marks, plant, share_on

    marks = make_marks(torch.Generator().manual_seed(0))
    assert marks.flatten(1).float().mean(dim=1).tolist() == [127.5] * 10 and len(marks.flatten(1).unique(dim=0)) == 10
    images = torch.full((2, 1, 28, 28), 9, dtype=torch.uint8)
    planted, mask = plant(images, marks, torch.tensor([3, 7]), torch.tensor([[0, 24], [10, 5]]))
    assert torch.equal(planted[0, 0, :4, 24:], marks[3]) and torch.equal(planted[1, 0, 10:14, 5:9], marks[7])
    assert mask.sum(dim=(1, 2)).tolist() == [16, 16] and (planted[:, 0][~mask] == 9).all() and (images == 9).all()
    maps = torch.zeros(2, 28, 28)
    maps[0, 1, 25], maps[0, 9, 9], maps[1, 10, 8] = 3.0, 1.0, 0.5
    assert share_on(maps, mask) == pytest.approx((0.75 + 1) / 2)


def test_cutout_sets_a_square_of_16_pixels_to_mean_grey_that_may_reach_over_the_edge():
    from peers import cutout

    x = cutout(torch.ones(3000, 1, 28, 28), torch.Generator().manual_seed(0))[:, 0]
    gone = x == 0
    heights, widths = gone.any(dim=2).sum(dim=1), gone.any(dim=1).sum(dim=1)
    assert torch.equal(heights * widths, gone.sum(dim=(1, 2))) and set(x.unique().tolist()) == {0.0, 1.0}
    assert heights.max() == widths.max() == 16 and heights.min() == widths.min() == 8
    assert gone[:, 0, 0].any() and gone[:, 27, 27].any()
    first_rows = gone.any(dim=2).int().argmax(dim=1)
    assert first_rows.min() == 0 and first_rows.max() == 20  # as few rows at the lower edge as at the upper one


def test_a_peer_goes_on_from_its_saved_epoch(monkeypatch, tmp_path):
    import peers

    images = torch.randint(0, 256, (256, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(256) % 10
    config = peers.step_time.settings_of("default", "float32", epochs=2, **peers.OWN_RECIPE)

    def fit(state):
        torch.manual_seed(0)
        model = peers.preact_resnet()
        sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=1e-4)
        return peers.fit(model, images, labels, config, "peer", [sgd], state)[0].state_dict()

    whole, calls, take_step = fit(None), [], peers.train.take_step

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        take_step(*arguments)

    monkeypatch.setattr(peers.train, "take_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "state.pt")
    for name, tensor in fit(tmp_path / "state.pt").items():
        assert torch.equal(tensor, whole[name]), name
