import copy
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from captum.attr import LayerGradCam, LayerGradientXActivation
from torchcam import methods as torchcam
from torchvision import models

import dataset
from gradcam import METHODS, GradCAM, shares_of_evidence, tokens_to_grid
from model import SHIPPED_CHECKPOINT, load_checkpoint


@pytest.fixture
def x(test_split):
    return dataset.normalize(test_split[0][:6])


def shares(maps):
    """Maps whose amounts add up to 1."""
    return maps / maps.abs().sum(dim=(1, 2), keepdim=True).clamp_min(1e-20)


# ---- The methods on paper ------------------------------------------------------------------------

# One image, two channels, 2 x 2 places. Mean gradients 1 and -0.5.
ACTIVATION = torch.tensor([[[[1.0, 0.0], [2.0, 4.0]], [[4.0, 2.0], [0.0, 0.0]]]])
GRADIENT = torch.tensor([[[[2.0, 0.0], [0.0, 2.0]], [[-1.0, -2.0], [0.0, 1.0]]]])


@pytest.mark.parametrize(
    "method, expected",
    [
        ("gradcam", [[0.0, 0.0], [2.0, 4.0]]),  # A_0 - A_1 / 2: -1, -1, 2, 4
        ("hirescam", [[0.0, 0.0], [0.0, 8.0]]),  # 2 - 4, 0 - 4, 0, 8 + 0
        ("layercam", [[2.0, 0.0], [0.0, 8.0]]),  # the negative gradients left out
        # Channel 0 adds up to 7: each of two places has the share 4 / (2 * 4 + 7 * 8) = 1 / 16, the
        # weight is
        # 2 * 2 / 16. Channel 1 adds up to 6, and one place has a positive gradient: 1 / (2 + 6) *
        # 1.
        ("gradcam++", [[0.25 + 0.5, 0.25], [0.5, 1.0]]),
    ],
)
def test_methods_on_paper(method, expected):
    def added_up(gradient):
        return (METHODS[method](ACTIVATION, gradient) * ACTIVATION).sum(dim=1).relu()

    assert added_up(GRADIENT).tolist() == [expected]
    # Where only negative gradients meet activations that are not negative, nothing speaks for the
    # class.
    assert added_up(-GRADIENT.abs()).count_nonzero() == 0
    assert added_up(torch.zeros_like(GRADIENT)).count_nonzero() == 0


class OnPaper(nn.Module):
    """A model whose layers put out given activations and whose logits have given gradients with
    respect to them.
    """

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in layers)
        self.given = layers

    def forward(self, images):
        logits = [0, 0]
        for layer, (activation, *gradients) in zip(self.layers, self.given, strict=True):
            output = layer(activation.clone())
            logits = [
                logit + (output * g).sum(dim=(1, 2, 3))
                for logit, g in zip(logits, gradients, strict=True)
            ]
        return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    "method, expected",
    [  # the map of logit 0, whose gradient is GRADIENT, against logit 1, whose gradient is zero
        ("gradcam", [[-1.0, -1.0], [2.0, 4.0]]),
        ("hirescam", [[-2.0, -4.0], [0.0, 8.0]]),
        ("layercam", [[-2.0, -4.0], [0.0, 8.0]]),
        # For the opposite, channel 0 has no weight; in channel 1 the gradients 1 and 2 have the
        # shares
        # 1 / (2 * 1 + 6 * 1) and 4 / (2 * 4 + 6 * 8): 1 / 8 + 1 / 7. Its whole weight is 1 / 8 - 1
        # / 8 - 1 / 7.
        ("gradcam++", [[0.25 - 4 / 7, -2 / 7], [0.5, 1.0]]),
    ],
)
def test_a_contrast_on_paper(method, expected):
    model, x = OnPaper((ACTIVATION, GRADIENT, 0 * GRADIENT)), torch.zeros(1, 1, 2, 2)
    expected = torch.tensor([expected])
    with GradCAM(model, "layers.0", method, reshape=lambda x: x) as cam:
        torch.testing.assert_close(cam(x, 0, versus=1), expected / expected.abs().max())
        torch.testing.assert_close(
            cam(x, 0, versus=1, normalize=False), expected / expected.abs().sum()
        )
        assert torch.equal(cam(x, 1, versus=0), -cam(x, 0, versus=1))
        assert (
            cam(x, 0, versus=0).count_nonzero() == cam(x, 1, normalize=False).count_nonzero() == 0
        )


def grid(*rows):
    return torch.tensor([[rows]])  # one image, one channel


def test_layers_are_averaged_by_their_shares_and_one_without_evidence_is_left_out():
    first = grid([1.0, 3.0], [0.0, 0.0]), torch.tensor(2.0), torch.tensor(-1.0)
    second = grid([0.0, 0.0], [0.0, 500.0]), torch.tensor(7.0), torch.tensor(3.0)
    x = torch.zeros(1, 1, 2, 2)
    model = OnPaper(first, second)
    with GradCAM(model, list(model.layers), "hirescam") as cam:
        assert cam(x, 0, normalize=False).tolist() == [[[0.125, 0.375], [0.0, 0.5]]]
        assert cam(x, 0).tolist() == [[[0.25, 0.75], [0.0, 1.0]]]
        # the first speaks against the class
        assert cam(x, 1, normalize=False).tolist() == [[[0.0, 0.0], [0.0, 1.0]]]
        # With a sign, the amounts of a layer add up to 1: here (-2, -6, 0, 2) and (0, 0, 0, 1).
    signed = grid([-2.0, -6.0], [0.0, 2.0]), torch.tensor(1.0), torch.tensor(0.0)
    model = OnPaper(signed, second)
    maps = GradCAM(model, list(model.layers), "hirescam")(x, 0, versus=1, normalize=False)
    torch.testing.assert_close(maps, torch.tensor([[[-0.1, -0.3], [0.0, 0.6]]]))


def test_shares_are_of_the_enlarged_map():
    # Bilinear from 2 to 4 pixels: 1, 3/4, 1/4, 0 both ways; added up 2 * 2.
    line = torch.tensor([1, 0.75, 0.25, 0])
    maps = shares_of_evidence(grid([8.0, 0.0], [0.0, -0.0]), (4, 4), signed=False)
    torch.testing.assert_close(maps, line[None, :, None] * line / 4)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("left, some", [(2e-6, False), (5e-5, True), (float("nan"), True)])
def test_what_is_left_over_of_large_terms_is_no_evidence(left, some, signed):
    products = torch.tensor([[[[0.5 + left, 0.0], [0.0, 0.0]], [[-0.5, 0.0], [0.0, 0.0]]]])
    for size in (2, 6):
        maps = shares_of_evidence(products, (size, size), signed)
        assert maps.any() == some and maps.isnan().any() == (left != left)


# ---- Layouts -------------------------------------------------------------------------------------


def remedies(message, **names):
    """The functions that a message offers as `reshape`."""
    return [
        eval(code, names)
        for code in re.findall(r"lambda \w: .*?(?=[;,]? with|; if|, after|$)", message)
    ]


@pytest.mark.parametrize(
    "shape, image_size, expected",
    [
        ((2, 64, 5), (32, 128), (4, 16)),  # 64 is a square number, but the image is none
        ((2, 64, 5), (128, 32), (16, 4)),
        ((2, 64, 5), (30, 30), (8, 8)),
        ((2, 7, 7, 5), (28, 28), (7, 7)),  # channels last
        ((2, 7, 7, 8), (28, 28), (7, 7)),
        ((2, 8, 7, 7), (28, 28), (7, 7)),
        ((2, 7, 5, 6), (55, 41), (7, 5)),
        ((2, 6, 4, 16), (32, 128), (4, 16)),
        ((2, 8, 97, 197), (200, 400), (97, 197)),  # convolutions without padding
        ((2, 5, 1, 1), (224, 224), (1, 1)),
    ],
)
def test_the_grid_has_the_shape_of_the_image(shape, image_size, expected):
    output = torch.rand(shape)
    found = tokens_to_grid(output, image_size)
    assert found.shape[2:] == expected
    if output.ndim == 3:
        assert torch.equal(found[:, :, 1, 2], output[:, expected[1] + 2])  # row by row
    else:
        assert torch.equal(found, output if shape[2:] == expected else output.movedim(3, 1))


@pytest.mark.parametrize(
    "shape, image_size",
    [
        ((2, 17, 5), (32, 32)),  # a class token
        ((2, 20, 5), (28, 28)),  # 16 patches and 4 registers, but also 4x5
        ((2, 30, 5), (35, 35)),
        ((2, 36, 5), (30, 100)),
        ((2, 1, 5), (28, 28)),
        ((2, 10), (28, 28)),
        ((2, 3, 15, 16), (28, 28)),
    ],
)
def test_what_is_no_grid_of_the_image_is_refused(shape, image_size):
    with pytest.raises(ValueError, match=f"{re.escape(str(shape))} is not laid out like .*reshape"):
        tokens_to_grid(torch.rand(shape), image_size)


@pytest.mark.parametrize(
    "shape, image_size",
    [
        ((2, 16, 16, 16), (64, 64)),
        ((2, 4, 16, 64), (32, 128)),
        ((2, 44, 75, 128), (176, 300)),  # 75x128 is 75x127.8 rounded
        ((2, 194, 97, 48), (200, 100)),  # a convolution without padding, but also 194x97
    ],
)
def test_a_grid_with_channels_first_and_with_channels_last_is_refused(shape, image_size):
    output = torch.rand(shape)
    with pytest.raises(
        ValueError, match=r"in two ways .* \(N, C, h, w\).* \(N, h, w, C\)"
    ) as error:
        tokens_to_grid(output, image_size)
    first, last, _ = remedies(str(error.value))
    assert torch.equal(first(output), output) and torch.equal(last(output), output.movedim(3, 1))


class Last(nn.Module):
    """As many channels as places a side, first in one layer and last in two."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu, self.head = (
            nn.Conv2d(1, 16, 1),
            nn.LayerNorm(16),
            nn.ReLU(),
            nn.Linear(16, 3),
        )

    def forward(self, x):
        return self.head(self.relu(self.norm(self.conv(x).movedim(1, 3))).mean(dim=(1, 2)))


@pytest.mark.parametrize("layer, dimension", [("conv", 1), ("norm", 3)])
def test_the_kind_of_a_layer_tells_where_its_channels_are(layer, dimension):
    torch.manual_seed(0)
    model, x = Last(), torch.rand(2, 1, 16, 16)
    expected = GradCAM(model, layer, "layercam", lambda x: x.movedim(dimension, 1))(x, 1)
    assert expected.any() and torch.equal(GradCAM(model, layer, "layercam")(x, 1), expected)
    with pytest.raises(ValueError, match="in two ways"):
        GradCAM(model, "relu")(x)
    # as queries (N, heads, T, d)
    model.norm.register_forward_pre_hook(lambda norm, inputs: inputs[0][:, ::4])
    with pytest.raises(ValueError, match=r"\(2, 4, 16, 16\) is not laid out"):
        GradCAM(model, "norm")(x)


def test_attention_weights_are_refused_with_a_remedy_that_works():
    torch.manual_seed(0)
    attention = torch.randn(1, 2, 5, 5).softmax(dim=3)  # a class token and 2 x 2 patches
    model, x = OnPaper((attention, torch.tensor(1.0), torch.tensor(0.0))), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="is attention weights") as error:
        GradCAM(model, "layers.0")(x)
    (remedy,) = remedies(str(error.value), h=2, w=2)
    expected = attention[:, 0, 0, 1:] + attention[:, 1, 0, 1:]
    maps = GradCAM(model, "layers.0", "hirescam", remedy)(x, 0, normalize=False)
    torch.testing.assert_close(maps, shares(expected.view(1, 2, 2)))


class Encoder(nn.Module):
    """A transformer's layer on patches of 7x7 pixels, with the batch in dimension 0 or 1."""

    def __init__(self, batch):
        super().__init__()
        self.patches, self.batch = nn.Conv2d(1, 8, 7, stride=7), batch
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch == 0)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT.movedim(0, self.batch)
        return self.layer(tokens).std(dim=1 - self.batch)


def test_the_batch_has_to_come_first_also_with_as_many_images_as_tokens():
    torch.manual_seed(0)
    first, second, x = Encoder(0), Encoder(1), torch.rand(16, 1, 28, 28)
    second.load_state_dict(first.state_dict())
    expected = torch.cat([GradCAM(first, "layer", "layercam")(images) for images in x.split(4)])
    torch.testing.assert_close(GradCAM(first, "layer", "layercam")(x), expected)
    for n in (16, 4, 3):
        with pytest.raises(ValueError, match=f"not a grid for each of the {n} images") as error:
            GradCAM(second, "layer")(x[:n])
    (remedy,) = remedies(str(error.value), extra=0, h=4, w=4)
    torch.testing.assert_close(GradCAM(second, "layer", "layercam", remedy)(x), expected)


# ---- Against other implementations ---------------------------------------------------------------


class ToGrid(nn.Module):
    """Tokens (N, 49, C) as a map (N, C, 7, 7), which is what captum understands."""

    def forward(self, x):
        return x.transpose(1, 2).unflatten(2, (7, 7))


class ToTokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    "layer", ["stem.first", "stem.stage1_0", "stem.down2.0.0", "stem.stage2_0", "blocks.0"]
)
def test_maps_agree_with_captum(small_model, x, layer):
    target = torch.tensor([0, 9, 3, 3, 6, 1])
    versus = torch.tensor([1, 0, 6, 4, 2, 8])
    cam = GradCAM(small_model, layer)
    maps, contrasts = cam(x, target, normalize=False), cam(x, target, versus, normalize=False)
    module = small_model.get_submodule(layer)
    if layer.startswith("blocks"):
        grid = ToGrid()
        small_model.blocks[0] = nn.Sequential(module, grid, ToTokens())
        module = grid
    expected = LayerGradCam(small_model, module).attribute(x, target=target, relu_attributions=True)
    expected = F.interpolate(expected, (28, 28), mode="bilinear")[:, 0].detach()
    assert maps.abs().max() > 0
    torch.testing.assert_close(maps, shares(expected), rtol=1e-4, atol=1e-7)

    def difference(images):
        logits, rows = small_model(images), torch.arange(6)
        return logits[rows, target] - logits[rows, versus]

    expected = LayerGradCam(difference, module).attribute(x)
    expected = F.interpolate(expected, (28, 28), mode="bilinear")[:, 0].detach()
    assert contrasts.min() < 0 < contrasts.max()
    torch.testing.assert_close(contrasts, shares(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layer", ["stem.first", "stem.stage2_0"])
def test_layercam_agrees_with_torchcam(small_model, x, layer):
    target = [0, 9, 3, 3, 6, 1]
    with torchcam.LayerCAM(small_model, small_model.get_submodule(layer)) as extractor:
        (expected,) = extractor(target, small_model(x), normalized=False)
    expected = F.interpolate(expected[:, None], (28, 28), mode="bilinear")[:, 0]
    maps = GradCAM(small_model, layer, "layercam")(x, target, normalize=False)
    assert maps.any()
    torch.testing.assert_close(maps, shares(expected), rtol=1e-4, atol=1e-4)


# ---- The hooks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_several_layers_give_the_mean_of_their_maps_from_one_pass(small_model, x, method):
    layers = ["stem.first", "stem.stage2_0", "blocks.0"]
    total = sum(GradCAM(small_model, layer, method)(x, 3, normalize=False) for layer in layers)
    calls = []
    small_model.register_forward_hook(lambda *_: calls.append("forward"))
    maps = GradCAM(small_model, layers[::-1], method)(x, 3, normalize=False)
    assert calls == ["forward"] and maps.any()
    torch.testing.assert_close(maps, shares(total), rtol=1e-4, atol=1e-8)


def test_hirescam_in_front_of_a_layer_norm_has_no_evidence_and_no_other_map_is_lost(test_split):
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    x = dataset.normalize(test_split[0][:50])
    predicted = model(x).argmax(dim=1)
    assert GradCAM(model, "blocks.0", "hirescam")(x).count_nonzero() == 0
    assert (
        GradCAM(model, "blocks.0", "hirescam")(
            x, predicted, versus=(predicted + 1) % 10
        ).count_nonzero()
        == 0
    )
    for method, layers in (
        ("layercam", model.stage_ends()[:2]),
        ("layercam", "blocks.0"),
        ("gradcam", "blocks.0"),
    ):
        assert GradCAM(model, layers, method)(x).amax(dim=(1, 2)).tolist() == [1] * 50


def test_the_default_class_is_the_predicted_one_and_each_image_may_have_its_own(small_model, x):
    with GradCAM(small_model, "stem.stage1_0") as cam:
        default = cam(x)
        predicted = cam.logits.argmax(dim=1)
        assert (
            default.shape == (6, 28, 28)
            and default.dtype == torch.float32
            and not default.requires_grad
        )
        assert torch.equal(default, cam(x, predicted)) and torch.equal(
            default, cam(x, predicted.tolist())
        )
        mixed = cam(x, [2, 2, 2, 5, 5, 5])
        torch.testing.assert_close(mixed[:3], cam(x[:3], 2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[3:], cam(x[3:], 5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cam.logits, small_model(x)[3:], rtol=1e-4, atol=1e-5)


def test_one_forward_and_one_backward_pass_no_further_than_the_layer(small_model, x):
    calls = []
    small_model.register_forward_hook(lambda *_: calls.append("forward"))
    for name in ("stem.down2", "blocks.1"):
        module = small_model.get_submodule(name)
        module.register_full_backward_hook(lambda *_, name=name: calls.append(f"backward {name}"))
    # If the pass went further than the target layer, the stem's hook would be called, too.
    GradCAM(small_model, "blocks.0")(x)
    assert calls == ["forward", "backward blocks.1"]
    assert all(parameter.grad is None for parameter in small_model.parameters())


def settings(model):
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return (
        hooks,
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )


def test_the_model_is_left_as_it_was_also_after_an_error(small_model, x):
    small_model.train()
    small_model.norm.eval()  # a part in another mode than the whole
    small_model.head.bias.requires_grad_(False)
    before = settings(small_model)
    statistics = {name: buffer.clone() for name, buffer in small_model.named_buffers()}
    GradCAM(small_model, "blocks.1")(x)
    assert settings(small_model) == before
    with pytest.raises(KeyError), GradCAM(small_model, "blocks.1") as cam:
        assert not any(module.training for module in small_model.modules())
        assert not any(parameter.requires_grad for parameter in small_model.parameters())
        cam(x)
        raise KeyError
    assert settings(small_model) == before
    with pytest.raises(RuntimeError):
        GradCAM(small_model, "blocks.1")(torch.zeros(2, 3, 28, 28))
    assert settings(small_model) == before
    assert all(
        torch.equal(buffer, statistics[name]) for name, buffer in small_model.named_buffers()
    )


def test_it_works_where_gradients_are_switched_off(small_model, x):
    with torch.no_grad():
        maps = GradCAM(small_model, small_model.blocks[0])(x)
    with torch.inference_mode():
        predicted = small_model.eval()(x).argmax(dim=1)
        assert torch.equal(maps, GradCAM(small_model, "blocks.0")(x * 1, predicted))
    assert torch.equal(maps, GradCAM(small_model, "blocks.0")(x, predicted))
    assert torch.equal(maps, GradCAM(small_model, "blocks.0")(x))


@pytest.mark.parametrize(
    "images", [(torch.zeros(2, 1, 28, 28),), [torch.zeros(1, 28, 28)], torch.zeros(1, 28, 28)]
)
def test_images_that_are_not_one_tensor_are_refused(small_model, images):
    with pytest.raises(
        ValueError,
        match=r"one tensor \(N, channels, H, W\), not a (tuple|list|tensor \(1, 28, 28\))",
    ):
        GradCAM(small_model, "blocks.0")(images)


@pytest.mark.parametrize(
    "reshape", [lambda t: t[:, 1:], lambda t: [t], lambda t: t[1:].mT.unflatten(2, (7, 7))]
)
def test_a_reshape_that_returns_no_grids_is_refused(small_model, x, reshape):
    with pytest.raises(
        ValueError, match=r"`reshape` returns a .*, not a tensor \(N, C, h, w\) for the 6 images"
    ):
        GradCAM(small_model, "blocks.0", reshape=reshape)(x)


class Twice(nn.Module):
    """A convolution of the images and of other ones, or else of what it made of the images."""

    def __init__(self, other):
        super().__init__()
        self.conv, self.once, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1), other

    def again(self, first):
        return self.conv(first.tanh() if self.other is None else self.other)

    def end(self, first, second):
        return self.once((first * second).sigmoid() + second).tanh().mean(dim=(2, 3))

    def forward(self, x):
        first = self.conv(x)
        return self.end(first, self.again(first))


@pytest.mark.parametrize("other", [None, torch.linspace(-1, 1, 384).view(2, 3, 8, 8)])
def test_of_a_layer_that_runs_twice_either_run_is_explained(other):
    torch.manual_seed(0)
    model, x, maps = Twice(other), torch.randn(2, 3, 8, 8), []
    for run in (0, 1):
        first = model.conv(x).detach().requires_grad_()
        second = model.again(first)
        chosen = (first, second)[run]
        (gradient,) = torch.autograd.grad(model.end(first, second)[:, 0].sum(), chosen)
        expected = (gradient * chosen).sum(dim=1).relu().detach()
        with GradCAM(model, "conv", "hirescam", run=run) as cam:
            model(x)  # counts as no run
            maps.append(cam(x, 0, normalize=False))
        torch.testing.assert_close(maps[run], shares(expected))
    once = GradCAM(model, "once", "hirescam")(x, 0, normalize=False)
    both = GradCAM(model, ["conv", "once"], "hirescam", run=1)(x, 0, normalize=False)
    torch.testing.assert_close(both, (maps[1] + once) / 2)


@pytest.mark.parametrize(
    "layer, run, count", [("conv", None, 2), ("conv", 2, 2), ("conv", -1, 2), ("once", 1, 1)]
)
def test_a_run_has_to_be_one_of_the_layers(layer, run, count):
    with pytest.raises(
        ValueError, match=f"runs in one forward pass is {count}: .*`run`, from 0 to {count - 1}"
    ):
        GradCAM(Twice(None), layer, run=run)(torch.randn(2, 3, 8, 8))


def test_a_layer_with_two_names_is_found_by_either_and_runs_once(small_model, x):
    small_model.same_blocks = small_model.blocks
    maps = GradCAM(small_model, "blocks.0")(x)
    assert maps.any() and torch.equal(maps, GradCAM(small_model, "same_blocks.0")(x))
    torch.testing.assert_close(maps, GradCAM(small_model, ["blocks.0", "same_blocks.0"])(x))


@pytest.mark.parametrize("target", [10, -1, [1, 2], [0.5] * 6, [0, 0, 0, 0, 0, 10]])
def test_impossible_classes_are_refused(small_model, x, target):
    with pytest.raises(ValueError, match="target_class: give"):
        GradCAM(small_model, "blocks.0")(x, target)
    with pytest.raises(ValueError, match="versus: give"):
        GradCAM(small_model, "blocks.0")(x, 0, versus=target)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_has_no_maps(small_model, x, method):
    with GradCAM(small_model, ["stem.first", "blocks.0"], method) as cam:
        assert (
            cam(x[:0]).shape
            == cam(x[:0], torch.arange(0), versus=3, normalize=False).shape
            == (0, 28, 28)
        )


def test_layers_without_places_and_unknown_names_are_refused(small_model, x):
    with pytest.raises(ValueError, match=r"no layer 'blocks.7'; it has .*blocks.1"):
        GradCAM(small_model, "blocks.7")
    with pytest.raises(ValueError, match="not a part of the model"):
        GradCAM(small_model, nn.Identity())
    with pytest.raises(ValueError, match="not laid out like the 28x28 image"):
        GradCAM(small_model, "head")(x)
    with pytest.raises(ValueError, match="does not go through"):
        GradCAM(small_model, "blocks")(x)
    with pytest.raises(ValueError, match="names no layer"):
        GradCAM(small_model, [])
    with pytest.raises(ValueError, match=r"no method 'scam'; there are gradcam, .*layercam"):
        GradCAM(small_model, "blocks.0", "scam")


# ---- Other people's models -----------------------------------------------------------------------


def without_in_place_operations(model, monkeypatch):
    """A copy of the model in which no operation overwrites its input."""
    relu, model = F.relu, copy.deepcopy(model)
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: relu(x))
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return model


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
@pytest.mark.parametrize(
    "name, layers",
    [
        ("resnet", "layer2.0.bn1"),
        ("resnet", ["bn1", "layer1.0.bn1", "layer2.0.bn1"]),
        ("densenet", "features"),
        ("densenet", ["features.transition1", "features"]),
    ],
)
def test_a_layer_that_an_in_place_operation_follows(monkeypatch, name, layers, method):
    torch.manual_seed(0)
    if name == "resnet":
        model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5).eval()
    else:
        model = models.DenseNet(8, (2, 2), 16, num_classes=5).eval()
    x = torch.rand(2, 3, 64, 64)
    maps = GradCAM(model, layers, method)(x, 1, normalize=False)
    contrasts = GradCAM(model, layers, method)(x, 1, versus=0, normalize=False)
    cam = GradCAM(without_in_place_operations(model, monkeypatch), layers, method)
    assert maps.sum(dim=(1, 2)).allclose(torch.ones(2)) and contrasts.min() < 0
    torch.testing.assert_close(maps, cam(x, 1, normalize=False))
    torch.testing.assert_close(contrasts, cam(x, 1, versus=0, normalize=False))


class Passing(nn.Module):
    """An identity in a branch, beside which its input goes on."""

    def __init__(self):
        super().__init__()
        self.first, self.branch, self.head = nn.Conv2d(1, 3, 1), nn.Identity(), nn.Linear(3, 2)

    def forward(self, x):
        x = self.first(x)
        return self.head((5 * x + self.branch(x) ** 2).mean(dim=(2, 3)))


def test_a_layer_that_hands_on_its_input_has_its_own_gradient():
    torch.manual_seed(0)
    model, x = Passing(), torch.rand(2, 1, 4, 4)
    alone = [
        GradCAM(model, layer, "hirescam")(x, 0, versus=1, normalize=False)
        for layer in ("first", "branch")
    ]
    both = GradCAM(model, ["first", "branch"], "hirescam")(x, 0, versus=1, normalize=False)
    torch.testing.assert_close(both, sum(alone) / 2)


@pytest.mark.parametrize("layer", ["norm", "features", "features.1"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_channels_last(layer, size):
    torch.manual_seed(0)
    model = models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=5).eval()
    x = torch.rand(2, 3, *size)
    maps = GradCAM(model, layer)(x, 1)
    expected = GradCAM(model, layer, reshape=lambda x: x.permute(0, 3, 1, 2))(x, 1)
    assert torch.equal(maps, expected) and maps.any(dim=2).any(dim=1).all()


def test_class_tokens_are_refused_with_a_remedy_that_works():
    torch.manual_seed(0)
    model, x = (
        models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5).eval(),
        torch.rand(2, 3, 32, 32),
    )
    nn.init.normal_(model.heads.head.weight)
    layer = model.encoder.layers.encoder_layer_0
    with pytest.raises(ValueError, match="is not laid out") as error:
        GradCAM(model, layer)(x)
    remedy = remedies(str(error.value), extra=1, h=4, w=4)[2]
    maps = GradCAM(model, layer, "hirescam", remedy)(x, 1, versus=0, normalize=False)
    products = [
        LayerGradientXActivation(model, layer).attribute(x, target=label).detach()
        for label in (0, 1)
    ]
    expected = (products[1] - products[0])[:, 1:].sum(dim=2).view(2, 1, 4, 4)
    expected = F.interpolate(expected, (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(maps, shares(expected), rtol=1e-3, atol=1e-5)


class Ending(nn.Module):
    """A small convolutional network with another end."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.relu, self.head, self.end = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Linear(4, 3),
            end,
        )

    def forward(self, x):
        return self.end(self, self.relu(self.conv(x)))

    def logits(self, x):
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "end, words",
    [
        (lambda model, x: (model.logits(x), x), "the model returns a tuple, not logits"),
        (lambda model, x: {"out": model.logits(x)}, "the model returns a dict, not logits"),
        (lambda model, x: model.logits(x)[:, 0], r"the model returns a tensor \(2,\), not logits"),
        (lambda model, x: model.logits(x.detach()), "no gradient reaches .* no_grad or detach"),
        (lambda model, x: model.logits(torch.ones_like(x)), "no gradient reaches .* do not depend"),
    ],
)
def test_models_that_cannot_be_explained_are_refused(end, words):
    model = Ending(end)
    for layers in ("conv", ["conv", "relu"]):
        with pytest.raises(ValueError, match=words):
            GradCAM(model, layers)(torch.rand(2, 1, 8, 8))
    assert (
        model.training
        and all(p.requires_grad for p in model.parameters())
        and not model.conv._forward_hooks
    )


def test_a_detached_first_layer_is_refused_although_a_later_one_has_a_gradient():
    model = Ending(lambda model, x: model.logits(model.late(x.detach())))
    model.late = nn.ReLU()
    with pytest.raises(ValueError, match="no gradient reaches"):
        GradCAM(model, ["conv", "late"])(torch.rand(2, 1, 8, 8))


def test_a_single_logit_is_class_0():
    torch.manual_seed(0)
    model, x = Ending(lambda model, x: model.logits(x)[:, :1]), torch.rand(2, 1, 8, 8)
    maps = GradCAM(model, "relu")(x)
    assert maps.any() and torch.equal(maps, GradCAM(model, "relu")(x, 0))
    with pytest.raises(ValueError, match="target_class: give class indices from 0 to 0"):
        GradCAM(model, "relu")(x, 1)


def test_a_compiled_model_has_the_maps_of_the_original(small_model, x):
    compiled = torch.compile(small_model, backend="eager")
    maps = GradCAM(small_model, "blocks.0")(x)
    assert torch.equal(GradCAM(compiled, "blocks.0")(x), maps)
    assert torch.equal(GradCAM(compiled, small_model.blocks[0])(x), maps)
