import errno
import math
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import SMALL_MODEL, assert_identical

import dataset
import model as model_module
from common.files import UserError
from model import (
    SHIPPED_CHECKPOINT,
    CheckpointError,
    HybridClassifier,
    Pool,
    ResidualBlock,
    load_checkpoint,
    save_checkpoint,
)
from train import RECIPES, SETTINGS, predict
from training.settings import choose_settings


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "teacher"])
def test_every_recipe_keeps_the_parameter_budget(recipe):
    settings = vars(choose_settings(SETTINGS, RECIPES, dict(recipe=recipe)))
    config = replace(SMALL_MODEL, **{name: settings[name] for name in vars(SMALL_MODEL)})
    model = HybridClassifier(config)
    assert model.num_parameters() <= 600_000


@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize("depth", [0, 2])
def test_logits_of_an_image_do_not_depend_on_its_batch(test_split, pool, depth):
    model = HybridClassifier(replace(SMALL_MODEL, pool=pool, depth=depth)).eval()
    x = dataset.normalize(test_split[0][:8])
    logits = model(x)
    assert logits.shape == (8, 10)
    torch.testing.assert_close(logits[3:4], model(x[3:4]), rtol=1e-4, atol=1e-5)


def test_a_residual_unit_of_pyramidnet_has_its_norm_first_and_no_relu_last(small_model):
    resnet, pyramid = small_model.stem.stage2_0, ResidualBlock(16, "pyramidnet").eval()
    x = torch.randn(2, 16, 7, 7, generator=torch.Generator().manual_seed(0))
    branch = resnet.conv2(F.relu(resnet.conv1(x)))
    torch.testing.assert_close(resnet(x), F.relu(x + branch))
    pyramid.load_state_dict(resnet.state_dict(), strict=False)
    # its norm is still the identity
    torch.testing.assert_close(pyramid(x), x + branch, rtol=1e-4, atol=1e-4)
    nn.init.constant_(pyramid.norm.bias, 2.0)
    torch.testing.assert_close(
        pyramid(x), x + resnet.conv2(F.relu(resnet.conv1(x + 2))), rtol=1e-4, atol=1e-4
    )


def test_the_settings_reach_the_residual_blocks():
    model = HybridClassifier(replace(SMALL_MODEL, residual_unit="pyramidnet"))
    assert isinstance(model.stem.stage2_0.norm, nn.BatchNorm2d)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(
        UserError, match="embed_dim 16 is not a multiple of num_heads 3: change one of them"
    ):
        replace(SMALL_MODEL, num_heads=3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_block_computes_what_pytorchs_own_encoder_layer_does(small_model, monkeypatch, fused):
    monkeypatch.setattr(model_module, "FUSED_ATTENTION", fused)
    block, x = (
        small_model.blocks[0],
        torch.randn(3, 49, 16, generator=torch.Generator().manual_seed(0)),
    )
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    options = dict(
        dim_feedforward=32, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )
    reference = nn.TransformerEncoderLayer(16, 2, **options)
    own, theirs = block.attention, reference.self_attn
    pairs = [(theirs.in_proj_weight, own.qkv.weight), (theirs.in_proj_bias, own.qkv.bias)]
    for a, b in (
        (theirs.out_proj, own.proj),
        (reference.linear1, block.mlp[0]),
        (reference.linear2, block.mlp[2]),
        (reference.norm1, block.norm1),
        (reference.norm2, block.norm2),
    ):
        pairs += [(a.weight, b.weight), (a.bias, b.bias)]
    for a, b in pairs:
        a.data.copy_(b)
    torch.testing.assert_close(block(x), reference(x), rtol=1e-4, atol=1e-5)


def test_pooling_weighs_tokens_by_the_softmax_of_their_scores():
    # scores 0 and log 3: weights 1/4 and 3/4
    tokens = torch.tensor([[[0.0, 8.0], [math.log(3.0), 4.0]]])
    pool = Pool(2, "attention")
    pool.score.weight.data, pool.score.bias.data = torch.tensor([[1.0, 0.0]]), torch.tensor([5.0])
    assert pool(tokens)[0].tolist() == pytest.approx([0.75 * math.log(3.0), 5.0])
    assert Pool(2, "mean")(tokens)[0].tolist() == pytest.approx([0.5 * math.log(3.0), 6.0])


def test_tokens_lie_row_by_row_and_know_their_position(small_model):
    small_model.blocks = nn.ModuleList()
    small_model.norm, small_model.pool, small_model.head = (
        nn.Identity(),
        nn.Identity(),
        nn.Identity(),
    )
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    maps, tokens = small_model.stem(x), small_model(x)
    assert maps.shape == (2, 16, 7, 7) and tokens.shape == (2, 49, 16)
    torch.testing.assert_close(
        tokens[:, 3 * 7 + 5], maps[:, :, 3, 5] + small_model.pos_embed[0, 3 * 7 + 5]
    )


def test_the_ends_of_the_stages_have_their_grids(small_model):
    assert small_model.stage_ends() == ["stem.first", "stem.stage1_0", "stem.stage2_0"]
    ends = HybridClassifier(replace(SMALL_MODEL, stem_blocks=(2, 0, 1))).stage_ends()
    assert ends == ["stem.stage0_1", "stem.down1", "stem.stage2_0"]


def test_stochastic_depth_drops_whole_branches_only_in_training():
    torch.manual_seed(0)
    model = HybridClassifier(replace(SMALL_MODEL, drop_path=0.5))
    assert [block.drop_path.p for block in model.blocks] == [0.25, 0.5]
    block, branch = model.blocks[-1], torch.ones(2000, 3, 4)
    assert torch.equal(block.eval().drop_path(branch), branch)
    kept = block.train().drop_path(branch)
    assert kept.flatten(1).unique(dim=0).tolist() == [[0.0] * 12, [2.0] * 12]
    assert kept.mean().item() == pytest.approx(1, abs=0.1)
    assert model.blocks[0].train().drop_path(branch).max().item() == pytest.approx(1 / 0.75)


def test_a_linear_layer_of_a_student_needs_no_bias():
    model = HybridClassifier(SMALL_MODEL)
    model.head = nn.Linear(SMALL_MODEL.embed_dim, 10, bias=False)
    model.reset_parameters()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_initial_weights_have_the_sizes_that_the_papers_give():
    torch.manual_seed(0)
    model = HybridClassifier(replace(SMALL_MODEL, embed_dim=64))
    filters = model.stem.down2[0][0].weight
    # He et al., counted at the output
    assert filters.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    assert model.blocks[0].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.bias.count_nonzero() == 0


# ---- Checkpoints ---------------------------------------------------------------------------------


class Extended(HybridClassifier):
    """The model as a student may extend it."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.gain = nn.Parameter(torch.tensor([1.5], dtype=torch.bfloat16))


def test_a_checkpoint_comes_back_as_it_was(test_split, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "HybridClassifier", Extended)
    saved = Extended(SMALL_MODEL).to(memory_format=torch.channels_last)
    history = [dict(epoch=1, lr=0.5)]
    save_checkpoint(tmp_path / "a.pt", saved, epoch=3, history=history, note="a word")
    model, checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert not model.training and model.config == SMALL_MODEL
    assert (checkpoint["epoch"], checkpoint["history"], checkpoint["note"]) == (
        3,
        history,
        "a word",
    )
    assert_identical(dict(model.state_dict()), dict(saved.state_dict()))
    x = dataset.normalize(test_split[0][:4])
    assert torch.equal(model(x), saved.eval()(x))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_checkpoint_is_found_in_the_home_folder(small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(tmp_path / "a.pt", small_model)
    assert load_checkpoint("~/a.pt")[0].config == SMALL_MODEL


def test_a_save_that_fails_half_way_leaves_the_old_file(small_model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", small_model, epoch=1)

    def fail(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset.os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*a.pt: No space left on device; make room"):
        save_checkpoint(tmp_path / "a.pt", small_model, epoch=2)
    assert load_checkpoint(tmp_path / "a.pt")[1]["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_flipped_bit_of_a_weight_is_noticed(small_model, tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, small_model)
    weights = small_model.head.weight.detach().numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weights) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError,
        match=r"a.pt is damaged or not a checkpoint .*has changed since it was written",
    ):
        load_checkpoint(path)


class Malicious:
    """A pickle of it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_is_no_checkpoint_is_refused_in_one_line_and_never_executed(small_model, tmp_path):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    save_checkpoint(good, small_model)
    foreign = [
        lambda: bad.write_bytes(b""),
        lambda: bad.write_bytes(good.read_bytes()[:-1000]),
        lambda: bad.write_bytes(pickle.dumps(Malicious(tmp_path / "made"))),
        lambda: torch.save(Malicious(tmp_path / "made"), bad),
        lambda: torch.save(dict(model=torch.ones(3)), bad),
        lambda: torch.save(torch.load(good) | dict(format="fashion-mnist-hybrid 2"), bad),
        lambda: torch.save([1, 2], bad),
        lambda: zipfile.ZipFile(bad, "w").close(),
    ]
    for make in foreign:
        make()
        with pytest.raises(
            CheckpointError, match=r"bad.pt is (damaged or not a|no) checkpoint"
        ) as error:
            load_checkpoint(bad)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(
            CheckpointError, match=r"cannot read .*; name a checkpoint that train.py wrote"
        ):
            load_checkpoint(path)


def test_what_a_checkpoint_says_of_its_training_has_to_be_of_the_right_type(small_model, tmp_path):
    row = dict(epoch=1, val_accuracy=0.9, seconds=1.5, my_accuracy=[0.1])
    save_checkpoint(tmp_path / "good.pt", small_model, train_config={}, history=[row], epoch=1)
    assert load_checkpoint(tmp_path / "good.pt")[1]["history"] == [row]
    for contents, words in (
        (dict(train_config=[1]), "train_config is no dict"),
        (dict(history="long"), "history is no list"),
        (dict(epoch="3"), "epoch is no int"),
        (dict(history=[{}]), "history has a wrong row"),
        (dict(history=[row, 5]), "history has a wrong row"),
        (
            dict(history=[row | dict(val_accuracy="high")]),
            "history has a wrong row",
        ),
    ):
        save_checkpoint(tmp_path / "bad.pt", small_model, **contents)
        with pytest.raises(CheckpointError, match=words) as error:
            load_checkpoint(tmp_path / "bad.pt")
        assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_told_why(small_model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", small_model)
    monkeypatch.setattr(model_module, "HybridClassifier", Extended)
    with pytest.raises(
        CheckpointError,
        match=r'does not fit the model that model.py builds now .*"gain".*train again',
    ):
        load_checkpoint(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt")
    content["model_config"]["width"] = 3
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"does not fit the model that model\.py builds now"):
        load_checkpoint(tmp_path / "a.pt")


def test_the_shipped_checkpoint_is_small_and_right_about_the_first_thousand(test_split):
    model, checkpoint = load_checkpoint(SHIPPED_CHECKPOINT)
    assert model.num_parameters() <= 600_000
    assert "training" not in checkpoint  # an optimiser's state would treble the file
    right = (predict(model, test_split[0][:1000]).argmax(dim=1) == test_split[1][:1000]).sum()
    assert right == 961  # as often as when it was shipped
