import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, SMALL_MODEL, assert_identical

import dataset
import model as model_module
from common.files import UserError
from model import (
    SHIPPED_CHECKPOINT,
    HybridClassifier,
    Pool,
    ResidualBlock,
    load_checkpoint,
    save_checkpoint,
)
from train import RECIPES, SETTINGS, make_model, predict
from training.settings import choose_settings


def random_input(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_the_parameters_that_the_readme_gives(recipe):
    model = make_model(choose_settings(SETTINGS, RECIPES, dict(recipe=recipe)))
    assert f" {model.num_parameters():,} " in (ROOT / "README.md").read_text()
    assert recipe == "teacher" or model.num_parameters() <= 600_000


@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize("depth", [0, 2])
def test_logits_of_an_image_do_not_depend_on_its_batch(test_split, pool, depth):
    model = HybridClassifier(replace(SMALL_MODEL, pool=pool, depth=depth)).eval()
    x = dataset.normalize(test_split[0][:8])
    logits = model(x)
    assert logits.shape == (8, 10)
    torch.testing.assert_close(logits[3:4], model(x[3:4]), rtol=1e-4, atol=1e-5)


def test_pyramidnets_unit_has_its_norm_first_and_no_relu_last():
    model = HybridClassifier(replace(SMALL_MODEL, residual_unit="pyramidnet")).eval()
    pyramid, resnet = model.stem.stage2_0, ResidualBlock(16, "resnet").eval()
    nn.init.constant_(pyramid.norm.bias, 2.0)
    resnet.load_state_dict(pyramid.state_dict(), strict=False)
    x = random_input(2, 16, 7, 7)

    def branch(x):
        return pyramid.conv2(F.relu(pyramid.conv1(x)))

    torch.testing.assert_close(resnet(x), F.relu(x + branch(x)))
    torch.testing.assert_close(pyramid(x), x + branch(x + 2), rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="embed_dim 16 is not a multiple of num_heads 3"):
        replace(SMALL_MODEL, num_heads=3)


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
def test_a_block_computes_what_pytorchs_own_encoder_layer_does(small_model, device):
    block, x = small_model.blocks[0], random_input(3, 49, 16)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    options = dict(dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)
    reference = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, **options)
    own, theirs = block.attention, reference.self_attn
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = own.qkv.weight, own.qkv.bias
    theirs.out_proj = own.proj
    reference.linear1, reference.linear2 = block.mlp[0], block.mlp[2]
    reference.norm1, reference.norm2 = block.norm1, block.norm2
    expected = reference(x)
    result = block.to(device)(x.to(device))
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_pooling_weighs_tokens_by_the_softmax_of_their_scores():
    # Scores 0 and log 3: weights 1/4 and 3/4.
    tokens = torch.tensor([[[0.0, 8.0], [math.log(3.0), 4.0]]])
    pool = Pool(2, "attention")
    pool.score.weight.data, pool.score.bias.data = torch.tensor([[1.0, 0.0]]), torch.tensor([5.0])
    assert pool(tokens)[0].tolist() == pytest.approx([0.75 * math.log(3.0), 5.0])
    assert Pool(2, "mean")(tokens)[0].tolist() == pytest.approx([0.5 * math.log(3.0), 6.0])


def test_tokens_lie_row_by_row_and_know_their_position(small_model):
    small_model.blocks = nn.ModuleList()
    small_model.norm = small_model.pool = nn.Identity()
    x = random_input(2, 1, 28, 28)
    maps, tokens = small_model.stem(x), small_model.embed(x)
    assert maps.shape == (2, 16, 7, 7) and tokens.shape == (2, 49, 16)
    place = 3 * 7 + 5
    torch.testing.assert_close(tokens[:, place], maps[..., 3, 5] + small_model.pos_embed[:, place])


def test_stochastic_depth_drops_whole_branches_only_in_training():
    torch.manual_seed(0)
    model = HybridClassifier(replace(SMALL_MODEL, drop_path=0.5))
    assert [block.drop_path.p for block in model.blocks] == [0.25, 0.5]
    block, branch = model.blocks[-1], torch.ones(200, 3, 4)
    assert torch.equal(block.eval().kept(branch), branch)
    kept = block.train().kept(branch)
    assert kept.flatten(1).unique(dim=0).tolist() == [[0.0] * 12, [2.0] * 12]


def test_initial_weights_have_the_sizes_that_the_papers_give():
    torch.manual_seed(0)
    model = HybridClassifier(replace(SMALL_MODEL, embed_dim=64))
    filters = model.stem.down2[0][0].weight
    assert filters.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    assert model.blocks[0].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.bias.count_nonzero() == 0


# ---- Checkpoints ----


class Extended(HybridClassifier):
    """The model as a student may extend it."""

    def __init__(self, config, data):
        super().__init__(config, data)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.gain = nn.Parameter(torch.tensor([1.5], dtype=torch.bfloat16))
        self.head = nn.Linear(config.embed_dim, 3, bias=False)
        self.reset_parameters()


def test_a_checkpoint_comes_back_as_it_was(test_split, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "HybridClassifier", Extended)
    data = dataset.DataInfo(("one", "two", "three"), mean=0.25, std=0.5)
    saved = Extended(SMALL_MODEL, data).to(memory_format=torch.channels_last)
    contents = dict(epoch=3, history=[dict(epoch=1, lr=0.5)], note="a word")
    save_checkpoint(tmp_path / "a.pt", saved, **contents)
    model, checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert not model.training and (model.config, model.data) == (SMALL_MODEL, data)
    assert checkpoint.items() >= contents.items()
    assert_identical(dict(model.state_dict()), dict(saved.state_dict()))
    x = dataset.normalize(test_split[0][:4], data)
    assert (255 * (0.5 * x + 0.25)).round().byte().equal(test_split[0][:4])
    assert torch.equal(model(x), saved.eval()(x)) and model(x).shape == (4, 3)


def test_what_is_no_checkpoint_is_refused_in_one_line(small_model, tmp_path):
    good = tmp_path / "good.pt"
    save_checkpoint(good, small_model)
    weights = small_model.head.weight.detach().numpy().tobytes()
    flipped = bytearray(good.read_bytes())
    flipped[flipped.index(weights) + 100] ^= 1
    paths = [tmp_path / f"bad{i}.pt" for i in range(4)]
    paths[0].write_bytes(flipped)
    paths[1].write_bytes(good.read_bytes()[:-1000])
    torch.save([1, 2], paths[2])
    torch.save(torch.load(good) | dict(format="fashion-mnist-hybrid 2"), paths[3])
    for path in paths:
        with pytest.raises(UserError, match=f"cannot read {path}: it is damaged or not of"):
            load_checkpoint(path)
    for path, reason in ((tmp_path / "none.pt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"cannot read {path}: {reason}"):
            load_checkpoint(path)


def test_a_checkpoint_of_another_model_is_told_why(small_model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", small_model)
    monkeypatch.setattr(model_module, "HybridClassifier", Extended)
    with pytest.raises(UserError, match=r'(?s)a.pt does not fit .*"gain".*train again'):
        load_checkpoint(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt")
    content["model_config"]["width"] = 3
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a.pt does not fit .*width"):
        load_checkpoint(tmp_path / "a.pt")


def test_the_shipped_checkpoint_is_small_and_right(test_split):
    model, checkpoint = load_checkpoint(SHIPPED_CHECKPOINT)
    assert "training" not in checkpoint  # an optimiser's state would treble the file
    right = (predict(model, test_split[0][:1000]).argmax(dim=1) == test_split[1][:1000]).sum()
    assert right == 961  # as often as when it was shipped
