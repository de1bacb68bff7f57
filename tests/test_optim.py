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
from training.optim import (
    Muon,
    check_optimizers,
    learning_rate,
    make_optimizers,
    orthogonalize,
    take_step,
    update_ema,
    whiten_first_layer,
)


def draw_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("cosine", {10: 0.5, 35: 0.25 * (1 + math.sqrt(0.5)), 60: 0.25, 110: 0.0}),
        ("linear", {10: 0.5, 35: 0.375, 60: 0.25, 110: 0.0}),
    ],
)
def test_the_learning_rate_warms_up_and_falls(schedule, expected):
    for step, value in ({0: 0.05, 4: 0.25, 9: 0.5} | expected).items():
        rate = learning_rate(step, total_steps=110, warmup_steps=10, peak=0.5, schedule=schedule)
        assert rate == pytest.approx(value, abs=1e-9)
    assert learning_rate(0, total_steps=10, warmup_steps=0, peak=0.5, schedule=schedule) == 0.5


# ---- The first layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [5, 8, 18])
def test_whitened_filters_are_the_principal_components_of_patches_with_both_signs(
    test_split, channels
):
    x = dataset.normalize(test_split[0][:20])
    patches = np.lib.stride_tricks.sliding_window_view(
        x[:, 0].numpy(), (3, 3), axis=(1, 2)
    ).reshape(-1, 9)
    components = PCA().fit(patches).components_[: (channels + 1) // 2]
    model = HybridClassifier(replace(SMALL_MODEL, stem_dims=(channels, 8)))
    whiten_first_layer(model, x)
    filters = model.stem.first[0][0].weight.view(channels, 9)
    cosines = (filters[::2] * torch.from_numpy(components)).sum(dim=1).abs()
    assert cosines.tolist() == pytest.approx([1.0] * len(components), abs=1e-3)
    assert filters.norm(dim=1).tolist() == pytest.approx([1.0] * channels)
    assert torch.equal(filters[1::2], -filters[: channels - 1 : 2])
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        f"stem.first.0.{name}" for name in ("0.weight", "1.weight", "1.bias")
    ]


def test_there_are_18_whitened_filters():
    with pytest.raises(
        UserError, match="only 18 filters: lower the first --stem-dims, or add --no-whiten"
    ):
        whiten_first_layer(
            HybridClassifier(replace(SMALL_MODEL, stem_dims=(19, 8))), torch.rand(4, 1, 28, 28)
        )


# ---- The averaged weights ------------------------------------------------------------------------


class Everything(nn.Module):
    """A value of each type that a checkpoint may hold."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.short = nn.Parameter(torch.full((2,), value, dtype=torch.bfloat16))
        self.register_buffer("running_mean", torch.full((2,), value))
        self.register_buffer("mask", torch.tensor([value, -torch.inf]))
        self.register_buffer("counter", torch.tensor(int(value)))
        self.register_buffer("flags", torch.tensor([value > 0, False]))


def test_the_average_follows_weights_and_statistics_and_copies_the_rest():
    ema, model = Everything(0.0), Everything(8.0)
    update_ema(ema, model, decay=0.9)
    for values in (ema.weight, ema.running_mean):
        assert values.tolist() == pytest.approx([0.8, 0.8], rel=1e-5)
    assert ema.short.dtype == torch.bfloat16 and ema.short.tolist() == [8.0, 8.0]
    assert ema.mask.tolist() == [8.0, -torch.inf]
    assert ema.counter.item() == 8 and ema.flags.tolist() == [True, False]
    assert model.weight.tolist() == [8.0, 8.0]


def test_without_averaging_the_average_is_the_model():
    ema, model = Everything(1.0), Everything(4.0)
    update_ema(ema, model, decay=0.0)
    assert ema.weight.tolist() == ema.running_mean.tolist() == [4.0, 4.0]


# ---- The step ------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two weights whose gradients 3 and 4 have the norm 5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
        self.a.grad, self.b.grad = torch.tensor([3.0]), torch.tensor([4.0])


@pytest.mark.parametrize(
    "limit, change", [(1.0, (0.6, 0.8)), (2.5, (1.5, 2.0)), (10.0, (3.0, 4.0)), (0.0, (3.0, 4.0))]
)
def test_the_gradient_of_all_weights_together_is_clipped(limit, change):
    model = Two()
    ema, optimizers = copy.deepcopy(model), [torch.optim.SGD(model.parameters(), lr=7.0)]
    take_step(model, ema, optimizers, 0.1, 0.1, limit)
    assert [model.a.item(), model.b.item()] == pytest.approx(
        [1 - 0.1 * c for c in change], rel=1e-5
    )
    assert model.a.grad is None and model.b.grad is None  # used up
    # The average follows after the step: it takes nine tenths of the new weight.
    assert ema.a.item() == pytest.approx(0.1 * 1 + 0.9 * (1 - 0.1 * change[0]), rel=1e-5)


def test_a_step_sets_the_learning_rate_of_every_group(small_model):
    optimizers = make_optimizers(small_model, "muon", weight_decay=0.05)
    draw_gradients(small_model, 0)
    take_step(small_model, copy.deepcopy(small_model), optimizers, 0.123, 0.0, 0.0)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [
        0.123
    ] * 3


def is_weight_of_a_layer(name: str) -> bool:
    """Whether it is the weight of a linear layer or a filter, by its name in the small model."""
    layers = (
        "0.0.weight",
        "conv1.0.weight",
        "conv2.0.weight",
        "qkv.weight",
        "proj.weight",
        "mlp.0.weight",
    )
    return name.endswith((*layers, "mlp.2.weight", "score.weight", "head.weight"))


def test_adamw_steps_like_pytorchs_own(small_model):
    other = copy.deepcopy(small_model)
    optimizers = make_optimizers(small_model, "adamw", weight_decay=0.3)
    named = dict(other.named_parameters())
    groups = [
        dict(
            params=[p for name, p in named.items() if is_weight_of_a_layer(name)], weight_decay=0.3
        ),
        dict(
            params=[p for name, p in named.items() if not is_weight_of_a_layer(name)],
            weight_decay=0.0,
        ),
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=False)
    for step, lr in enumerate((1e-2, 3e-2, 2e-2)):
        draw_gradients(small_model, step)
        draw_gradients(other, step)
        take_step(small_model, copy.deepcopy(small_model), optimizers, lr, 0.0, 0.0)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for name, p in small_model.named_parameters():
        torch.testing.assert_close(p, named[name], msg=name)


# ---- Muon ----------------------------------------------------------------------------------------


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """What Newton and Schulz's iteration makes of a matrix, by its singular values: only these
    change.
    """
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (30, 30), (1, 5)])
def test_orthogonalize_changes_only_the_singular_values(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    updates = torch.stack(orthogonalize(list(matrices)))
    for update, matrix in zip(updates.numpy(), matrices.double().numpy(), strict=True):
        np.testing.assert_allclose(update, orthogonal(matrix), atol=1e-4)
    if shape != (30, 30):  # a square matrix has singular values near 0, which stay small
        singular_values = torch.linalg.svdvals(updates)
        assert 0.65 < singular_values.min() and singular_values.max() < 1.25


def test_muon_on_paper():
    # The gradient is the identity, so is the momentum but for a factor: the update is the identity
    # times a number,
    # 1 / sqrt(2) taken five times through the polynomial. Its scale is 0.2 * sqrt(2); the weight of
    # 10 decays first.
    s = 1 / math.sqrt(2)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    weight = nn.Parameter(10 * torch.eye(2))
    weight.grad = torch.eye(2)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    expected = (10 * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(2) * s) * torch.eye(2)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_muon_steps_as_written_in_double_precision():
    # Two filters and a matrix of the same shape once flattened, and one that is tall; several
    # steps, for the momentum.
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (8, 36), (8, 4, 3, 3), (20, 6)]
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    # as the model has its filters
    weights[0].data = weights[0].data.to(memory_format=torch.channels_last)
    expected = [p.detach().double().flatten(1).numpy().copy() for p in weights]
    momentum = [np.zeros_like(value) for value in expected]
    optimizer = Muon(weights, lr=0.0, weight_decay=0.4)
    for lr in (0.1, 0.05, 0.2):
        for i, p in enumerate(weights):
            p.grad = torch.randn(p.shape, generator=generator)
            gradient = p.grad.double().flatten(1).numpy()
            momentum[i] = 0.95 * momentum[i] + 0.05 * gradient
            # Nesterov's form: the gradient once more
            update = orthogonal(0.05 * gradient + 0.95 * momentum[i])
            expected[i] = (1 - lr * 0.4) * expected[i] - lr * 0.2 * math.sqrt(
                max(expected[i].shape)
            ) * update
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for p, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(p.detach().flatten(1).numpy(), value, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, dict(stem_dims=(8, 16)), dict(pool="mean", embed_dim=48, num_heads=3)]
)
def test_hidden_layers_go_to_muon_and_only_weights_of_layers_decay(changes):
    model = HybridClassifier(replace(SMALL_MODEL, **changes))
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = make_optimizers(model, "muon", weight_decay=0.07)
    assert type(adamw) is torch.optim.AdamW and type(muon) is Muon
    assert [group["weight_decay"] for group in adamw.param_groups + muon.param_groups] == [
        0.07,
        0.0,
        0.07,
    ]
    decayed, others = ({names[id(p)] for p in group["params"]} for group in adamw.param_groups)
    scores = {"pool.score.weight"} if model.config.pool == "attention" else set()
    assert decayed == {"stem.first.0.0.weight", "head.weight"} | scores
    hidden = {"stem.down1.0.0.weight", "stem.down2.0.0.weight"}
    hidden |= {
        f"stem.{stage}.conv{i}.0.weight" for stage in ("stage1_0", "stage2_0") for i in (1, 2)
    }
    for block in ("blocks.0", "blocks.1"):
        hidden |= {
            f"{block}.{part}.weight"
            for part in ("attention.qkv", "attention.proj", "mlp.0", "mlp.2")
        }
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == hidden
    assert others == set(names.values()) - decayed - hidden and "pos_embed" in others


@pytest.mark.parametrize("kind", ["muon", "adamw", "a student's SGD"])
def test_every_parameter_is_optimised_exactly_once(small_model, kind):
    source, edited = inspect.getsource(optim), {}
    if kind == "a student's SGD":  # the natural edit, in place of both optimisers
        start, end = source.index('    if kind == "adamw":'), source.index("def adamw(")
        edit = "    return [torch.optim.SGD(groups, lr=0.0, momentum=0.9)]\n\n\n"
        source = source[:start] + edit + source[end:]
    exec(source, edited)
    optimizers = edited["make_optimizers"](small_model, kind, weight_decay=0.1)
    optimised = [
        p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    ]
    assert sorted(map(id, optimised)) == sorted(map(id, small_model.parameters()))
    check_optimizers(small_model, optimizers)


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


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_bfloat16_weight_trains_beside_the_others_and_a_frozen_one_stays(small_model, kind):
    exact, frozen = copy.deepcopy(small_model), small_model.blocks[1].mlp[0].weight.clone()
    small_model.blocks[0].mlp.bfloat16()
    for model in (small_model, exact):
        optimizers = make_optimizers(model, kind, weight_decay=0.1)
        draw_gradients(model, 0)
        model.blocks[1].mlp[0].weight.grad = None
        take_step(model, copy.deepcopy(model), optimizers, 0.05, 0.9, 1.0)
    for (name, p), q in zip(small_model.named_parameters(), exact.parameters(), strict=True):
        assert p.dtype == (torch.bfloat16 if "blocks.0.mlp" in name else torch.float32)
        torch.testing.assert_close(p.float(), q, rtol=2e-2, atol=5e-3, msg=name)
    assert torch.equal(small_model.blocks[1].mlp[0].weight, frozen)


def test_a_step_takes_its_numbers_as_tensors_too(small_model):
    """As a CUDA graph needs them, whose numbers are places in memory."""
    x, results = torch.rand(4, 1, 28, 28), []
    for kind in (float, torch.tensor):
        model = copy.deepcopy(small_model)
        ema, optimizers = copy.deepcopy(model), make_optimizers(model, "muon", 0.05)
        for lr, decay in ((0.01, 0.5), (0.02, 0.9)):
            model(x).square().sum().backward()
            take_step(model, ema, optimizers, kind(lr), kind(decay), 1.0)
        results.append(
            {**model.state_dict(), **{f"ema.{name}": t for name, t in ema.state_dict().items()}}
        )
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)
