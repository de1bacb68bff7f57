import copy
import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import SMALL_MODEL
from sklearn.decomposition import PCA

import dataset
from common.files import UserError
from model import HybridClassifier
from training import optim
from training.optim import Muon, check_optimizers, make_optimizers, whiten_first_layer


@pytest.mark.parametrize(
    "schedule, middle", [("cosine", 0.25 * (1 + math.sqrt(0.5))), ("linear", 0.375)]
)
def test_the_learning_rate_warms_up_and_falls(schedule, middle):
    for step, value in {0: 0.05, 4: 0.25, 9: 0.5, 10: 0.5, 35: middle, 60: 0.25, 110: 0.0}.items():
        rate = optim.learning_rate(step, 110, warmup_steps=10, peak=0.5, schedule=schedule)
        assert rate == pytest.approx(value, abs=1e-9)
    assert optim.learning_rate(0, 10, warmup_steps=0, peak=0.5, schedule=schedule) == 0.5


# ---- The first layer ----


def test_whitened_filters_are_the_principal_components(test_split):
    channels, x = 5, dataset.normalize(test_split[0][:20])
    windows = np.lib.stride_tricks.sliding_window_view(x[:, 0].numpy(), (3, 3), axis=(1, 2))
    components = PCA().fit(windows.reshape(-1, 9)).components_[: (channels + 1) // 2]
    model = HybridClassifier(replace(SMALL_MODEL, stem_dims=(channels, 8)))
    whiten_first_layer(model, x)
    filters = model.stem.first[0][0].weight.view(channels, 9)
    cosines = (filters[::2] * torch.from_numpy(components)).sum(dim=1).abs()
    assert cosines.tolist() == pytest.approx([1.0] * len(components), abs=1e-3)
    assert filters.norm(dim=1).tolist() == pytest.approx([1.0] * channels)
    assert torch.equal(filters[1::2], -filters[: channels - 1 : 2])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"stem.first.0.{name}" for name in ("0.weight", "1.weight", "1.bias")]
    model = HybridClassifier(replace(SMALL_MODEL, stem_dims=(19, 8)))
    before = model.stem.first[0][0].weight.clone()
    whiten_first_layer(model, x)
    is_kept = (model.stem.first[0][0].weight == before).flatten(1).all(dim=1)
    assert is_kept.tolist() == [False] * 18 + [True]


# ---- The averaged weights ----


@pytest.mark.parametrize("decay, average", [(0.9, 0.8), (0.0, 8.0)])
def test_the_average_copies_what_small_steps_would_not_change(decay, average):
    ema, model = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    for module, value in ((ema, 0), (model, 8)):
        module.bias.data = module.bias.data.bfloat16()
        for tensor in module.state_dict().values():
            tensor.fill_(value)
    optim.update_ema(ema, model, decay)
    found = {name: tensor.item() for name, tensor in ema.state_dict().items()}
    averaged = dict.fromkeys(("weight", "running_mean", "running_var"), pytest.approx(average))
    assert found == averaged | dict(bias=8, num_batches_tracked=8)


# ---- The step ----


@pytest.mark.parametrize("limit, clipped", [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_the_gradient_of_all_weights_together_is_clipped(limit, clipped):
    model = nn.ParameterList([torch.ones(1), torch.ones(1)])
    for p, gradient in zip(model, (3.0, 4.0), strict=True):  # of the norm 5
        p.grad = torch.tensor([gradient])
    ema, optimizers = copy.deepcopy(model), [torch.optim.SGD(model.parameters(), lr=7.0)]
    optim.take_step(model, ema, optimizers, 0.1, 0.1, limit)
    expected = [1 - 0.3 * clipped, 1 - 0.4 * clipped]
    assert [p.item() for p in model] == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for p in model)  # used up
    # The average follows after the step: it takes nine tenths of the new weight.
    assert ema[0].item() == pytest.approx(0.1 + 0.9 * expected[0], rel=1e-5)


# ---- Muon ----


def orthogonal(matrix):
    """What Newton and Schulz's iteration makes of a matrix: only its singular values change."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    s = 7.2939 * s - 20.9967 * s**3 + 15.4426 * s**5
    s = 3.2712 * s - 2.7957 * s**3 + 0.6547 * s**5
    s = 2.5266 * s - 2.1254 * s**3 + 0.6162 * s**5
    return u * s @ v


def test_singular_values_end_near_1():
    values = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.1, 0.05, 0.03])
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(7, 7, generator=generator))[0] for _ in range(2))
    (result,) = optim.orthogonalize([left * values @ right])
    ended = torch.linalg.svdvals(result)
    assert ended.min() > 0.88 and ended.max() < 1.15
    torch.testing.assert_close(left.mT @ result @ right.mT, torch.eye(7), atol=0.15, rtol=0)


def test_muon_steps_as_written_in_double_precision():
    # Two filters and a matrix of one shape once flattened; a tall, a square and a flat matrix.
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (8, 36), (8, 4, 3, 3), (20, 6), (6, 6), (1, 5)]
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    weights[0].data = weights[0].data.to(memory_format=torch.channels_last)  # as in the model
    expected = [p.detach().double().flatten(1).numpy().copy() for p in weights]
    momentum = [np.zeros_like(value) for value in expected]
    frozen = nn.Parameter(torch.ones(6, 6))
    optimizer = Muon([frozen, *weights], lr=0.0, weight_decay=0.4, momentum=0.9)
    for lr in (0.1, 0.05, 0.2):
        for i, p in enumerate(weights):
            p.grad = torch.randn(p.shape, generator=generator)
            gradient = p.grad.double().flatten(1).numpy()
            momentum[i] = 0.9 * momentum[i] + 0.1 * gradient
            # Nesterov's form: the gradient once more
            update = orthogonal(0.1 * gradient + 0.9 * momentum[i])
            scale = 0.2 * math.sqrt(max(update.shape))
            expected[i] = (1 - lr * 0.4) * expected[i] - lr * scale * update
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    assert frozen.min() == frozen.max() == 1
    for p, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(p.detach().flatten(1).numpy(), value, atol=1e-4)


def test_hidden_layers_go_to_muon_and_only_matrices_decay(small_model):
    names = {p: name for name, p in small_model.named_parameters()}
    adamw, muon = make_optimizers(small_model, "muon", weight_decay=0.07, momentum=0.8)
    assert type(adamw) is torch.optim.AdamW and type(muon) is Muon
    groups = adamw.param_groups + muon.param_groups
    assert [group["weight_decay"] for group in groups] == [0.07, 0.0, 0.07]
    assert muon.param_groups[0]["momentum"] == 0.8 and adamw.defaults["betas"] == (0.9, 0.98)
    decayed, others, hidden = ({names[p] for p in group["params"]} for group in groups)
    assert decayed == {"stem.first.0.0.weight", "pool.score.weight", "head.weight"}
    parts = [f"stem.down{i}.0.0" for i in (1, 2)]
    parts += [f"stem.stage{i}_0.conv{j}.0" for i in (1, 2) for j in (1, 2)]
    for i in (0, 1):
        parts += [f"blocks.{i}.{x}" for x in ("attention.qkv", "attention.proj", "mlp.0", "mlp.2")]
    assert hidden == {f"{part}.weight" for part in parts}
    assert others == set(names.values()) - decayed - hidden
    (alone,) = make_optimizers(small_model, "adamw", weight_decay=0.07, momentum=0.8)
    matrices, rest = ({names[p] for p in group["params"]} for group in alone.param_groups)
    assert (matrices, rest) == (decayed | hidden, others)


def test_the_optimizer_of_a_student_has_every_parameter(small_model):
    source, edited = inspect.getsource(optim), {}
    start, end = source.index("    optimizers = []\n"), source.index("def check_optimizers")
    edit = "    return [torch.optim.SGD(groups, lr=0.0, momentum=0.9)]\n\n\n"
    exec(source[:start] + edit + source[end:], edited)
    check_optimizers(small_model, edited["make_optimizers"](small_model, "muon", 0.1, 0.9))


def test_a_weight_that_no_optimizer_has_is_refused_by_name(small_model):
    every = list(small_model.parameters())
    some = [p for p in every if p is not small_model.head.weight]
    with pytest.raises(UserError, match=r"gives head\.weight to 0 optimizers"):
        check_optimizers(small_model, [torch.optim.SGD(some, lr=0.1)])
    twice = [torch.optim.SGD(every, lr=0.1), torch.optim.SGD([small_model.pos_embed], lr=0.1)]
    with pytest.raises(UserError, match=r"gives pos_embed to 2 optimizers"):
        check_optimizers(small_model, twice)
    small_model.head.weight.requires_grad_(False)  # it is not to be trained
    check_optimizers(small_model, [torch.optim.SGD(some, lr=0.1)])
