import errno
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL_MODEL

import dataset
import train
from model import (
    HISTORY_COLUMNS,
    MAX_PARAMETERS,
    CheckpointError,
    HybridClassifier,
    ModelConfig,
    load_checkpoint,
    save_checkpoint,
)


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_every_recipe_keeps_the_parameter_budget(recipe):
    settings = train.choose_settings({"recipe": recipe})
    model = HybridClassifier(ModelConfig(**{name: settings[name] for name in ModelConfig.__dataclass_fields__}))
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS == 600_000


@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize("depth", [0, 2])
def test_logits_of_an_image_do_not_depend_on_its_batch(test_split, pool, depth):
    model = HybridClassifier(replace(SMALL_MODEL, pool=pool, depth=depth)).eval()
    x = dataset.normalize(test_split[0][:8])
    logits = model(x)
    assert logits.shape == (8, 10)
    torch.testing.assert_close(logits[3:4], model(x[3:4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_heads=3), "multiple of num_heads"),
        (dict(depth=-1), "depth"),
        (dict(embed_dim=0), "embed_dim"),
        (dict(stem_dims=(4, 8.0)), "stem_dims"),
        (dict(stem_blocks=(1, 1)), "stem_blocks"),
        (dict(stem_blocks=(1, 1, -1)), "stem_blocks"),
        (dict(mlp_ratio=float("nan")), "mlp_ratio"),
        (dict(pool="max"), "pool"),
        (dict(drop_path=1.0), "drop_path"),
    ],
)
def test_impossible_configurations_say_what_to_change(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL_MODEL, **changes)


def test_stochastic_depth_drops_whole_branches_only_in_training():
    block = HybridClassifier(replace(SMALL_MODEL, drop_path=0.5)).blocks[-1]
    branch = torch.ones(2000, 3, 4)
    assert torch.equal(block.eval().skip(branch), branch)
    kept = block.train().skip(branch)
    assert kept.flatten(1).unique(dim=0).tolist() == [[0.0] * 12, [2.0] * 12]
    assert kept.mean().item() == pytest.approx(1, abs=0.15)


def test_a_checkpoint_comes_back_as_it_was(small_model, test_split, tmp_path):
    history = [dict.fromkeys(HISTORY_COLUMNS, 0.5) | {"epoch": 1}]
    save_checkpoint(tmp_path / "a.pt", small_model, epoch=3, history=history)
    model, checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert not model.training and checkpoint["epoch"] == 3 and checkpoint["history"] == history
    weights = small_model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    x = dataset.normalize(test_split[0][:4])
    # Laid out alike, they round alike.
    assert torch.equal(model(x), small_model.to(memory_format=torch.channels_last)(x))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_save_that_fails_half_way_leaves_the_old_file(small_model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", small_model, epoch=1)

    def fail(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device; make room"):
        save_checkpoint(tmp_path / "a.pt", small_model, epoch=2)
    assert load_checkpoint(tmp_path / "a.pt")[1]["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(version=3), "has format version 3, this code reads 2"),
        (dict(format="foreign"), "is not a checkpoint of this project"),
        (dict(model_config={}), "lacks its model's configuration"),
    ],
)
def test_a_foreign_checkpoint_is_told_why(small_model, tmp_path, changes, words):
    save_checkpoint(tmp_path / "a.pt", small_model, **changes)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "a.pt")


def test_the_shipped_checkpoint_loads_and_keeps_the_budget():
    model, checkpoint = load_checkpoint(ROOT / "checkpoints" / "shipped" / "model.pt")
    assert model.num_parameters() <= MAX_PARAMETERS
    assert "training" not in checkpoint  # an optimiser's state would treble the file
