import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_MODEL

import dataset
import model as model_module
import train
from model import MAX_PARAMETERS, CheckpointError, HybridClassifier, ModelConfig, load_checkpoint, save_checkpoint


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
    save_checkpoint(tmp_path / "a.pt", small_model, epoch=3, history=[{"epoch": 1, "lr": 0.5}])
    model, checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert not model.training and checkpoint["epoch"] == 3 and checkpoint["history"] == [{"epoch": 1, "lr": 0.5}]
    weights = small_model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    x = dataset.normalize(test_split[0][:4])
    # Laid out alike, they round alike.
    assert torch.equal(model(x), small_model.to(memory_format=torch.channels_last)(x))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_save_that_fails_half_way_leaves_the_old_file(small_model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", small_model, epoch=1)

    def half(contents, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left")

    monkeypatch.setattr(model_module.torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path / "a.pt", small_model, epoch=2)
    assert load_checkpoint(tmp_path / "a.pt")[1]["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class Trap:
    """What a malicious pickle looks like: reading it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "is not a file"),
        ("folder", "is not a file"),
        ("empty", "cannot be read"),
        ("truncated", "cannot be read"),
        ("text", "damaged"),
        ("code", "could run code"),
        ("code in torch format", "could run code"),
        ("foreign", "not a checkpoint of this project"),
        ("newer", "version 99"),
        ("configuration", "impossible model configuration"),
        ("huge", "does not fit its own configuration"),
        ("shape", "does not fit its own configuration"),
        ("nan", "not finite"),
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_line_and_runs_nothing(small_model, tmp_path, kind, words):
    path, touched = tmp_path / "bad.pt", tmp_path / "touched"
    save_checkpoint(path, small_model)
    contents = torch.load(path, weights_only=True)
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path = tmp_path
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Trap(touched)))
    elif kind == "code in torch format":
        torch.save(contents | {"trap": Trap(touched)}, path)
    elif kind == "foreign":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    else:
        if kind == "newer":
            contents["version"] = 99
        elif kind == "configuration":
            contents["model_config"]["num_heads"] = 5
        elif kind == "huge":
            contents["model_config"] |= dict(embed_dim=1024, depth=200)
        elif kind == "shape":
            contents["model"]["head.bias"] = torch.zeros(11)
        elif kind == "nan":
            contents["model"]["head.bias"][0] = float("nan")
        torch.save(contents, path)
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not touched.exists()


def test_the_shipped_checkpoint_loads_and_keeps_the_budget():
    model, checkpoint = load_checkpoint(ROOT / "checkpoints" / "shipped" / "model.pt")
    assert model.num_parameters() <= MAX_PARAMETERS
    assert "training" not in checkpoint  # an optimiser's state would treble the file
