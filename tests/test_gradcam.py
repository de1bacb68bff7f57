import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from captum.attr import LayerAttribution, LayerGradCam, LayerGradientXActivation
from torchcam import methods as torchcam
from torchvision import models

import dataset
from gradcam import METHODS, GradCAM, shares_of_evidence, tokens_to_grid
from model import SHIPPED_CHECKPOINT, load_checkpoint


@pytest.fixture
def x(test_split):
    return dataset.normalize(test_split[0][:6])


# ---- The methods on paper --------------------------------------------------------------------------------------------

# One image, two channels, 2 x 2 places. Mean gradients 1 and -0.5.
ACTIVATION = torch.tensor([[[[1.0, 0.0], [2.0, 4.0]], [[4.0, 2.0], [0.0, 0.0]]]])
GRADIENT = torch.tensor([[[[2.0, 0.0], [0.0, 2.0]], [[-1.0, -2.0], [0.0, 1.0]]]])


@pytest.mark.parametrize(
    "method, expected",
    [
        ("gradcam", [[0.0, 0.0], [2.0, 4.0]]),  # A_0 - A_1 / 2: -1, -1, 2, 4
        ("hirescam", [[0.0, 0.0], [0.0, 8.0]]),  # 2 - 4, 0 - 4, 0, 8 + 0
        ("layercam", [[2.0, 0.0], [0.0, 8.0]]),  # the negative gradients left out
        # Channel 0 adds up to 7: each of two places has the share 4 / (2 * 4 + 7 * 8) = 1 / 16, the weight is
        # 2 * 2 / 16. Channel 1 adds up to 6, and one place has a positive gradient: 1 / (2 + 6) * 1.
        ("gradcam++", [[0.25 + 0.5, 0.25], [0.5, 1.0]]),
    ],
)
def test_methods_on_paper(method, expected):
    def added_up(gradient):
        return (METHODS[method](ACTIVATION, gradient) * ACTIVATION).sum(dim=1).relu()

    assert added_up(GRADIENT).tolist() == [expected]
    # Where only negative gradients meet activations that are not negative, nothing speaks for the class.
    assert added_up(-GRADIENT.abs()).count_nonzero() == 0
    assert added_up(torch.zeros_like(GRADIENT)).count_nonzero() == 0


class OnPaper(nn.Module):
    """A model whose layers put out given activations and whose logits have given gradients with respect to them."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in layers)
        self.given = layers

    def forward(self, images):
        logits = [0, 0]
        for layer, (activation, *gradients) in zip(self.layers, self.given, strict=True):
            output = layer(activation.clone())
            logits = [logit + (output * g).sum(dim=(1, 2, 3)) for logit, g in zip(logits, gradients, strict=True)]
        return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    "method, expected",
    [  # the map of logit 0, whose gradient is GRADIENT, against logit 1, whose gradient is zero
        ("gradcam", [[-1.0, -1.0], [2.0, 4.0]]),
        ("hirescam", [[-2.0, -4.0], [0.0, 8.0]]),
        ("layercam", [[-2.0, -4.0], [0.0, 8.0]]),
        # For the opposite, channel 0 has no weight; in channel 1 the gradients 1 and 2 have the shares
        # 1 / (2 * 1 + 6 * 1) and 4 / (2 * 4 + 6 * 8): 1 / 8 + 1 / 7. Its whole weight is 1 / 8 - 1 / 8 - 1 / 7.
        ("gradcam++", [[0.25 - 4 / 7, -2 / 7], [0.5, 1.0]]),
    ],
)
def test_a_contrast_on_paper(method, expected):
    model, x, expected = (
        OnPaper((ACTIVATION, GRADIENT, 0 * GRADIENT)),
        torch.zeros(1, 1, 2, 2),
        torch.tensor([expected]),
    )
    with GradCAM(model, "layers.0", method) as cam:
        torch.testing.assert_close(cam(x, 0, versus=1), expected / expected.abs().max())
        torch.testing.assert_close(cam(x, 0, versus=1, normalize=False), expected / expected.abs().sum())
        assert torch.equal(cam(x, 1, versus=0), -cam(x, 0, versus=1))
        assert cam(x, 0, versus=0).count_nonzero() == 0


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
        assert cam(x, 1, normalize=False).tolist() == [[[0.0, 0.0], [0.0, 1.0]]]  # the first speaks against the class
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


def test_tokens_are_laid_out_row_by_row():
    tokens = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
    grid = tokens_to_grid(tokens, (28, 28))
    assert grid.shape == (2, 4, 3, 3)
    assert torch.equal(grid[:, :, 1, 2], tokens[:, 5])
    assert torch.equal(tokens_to_grid(grid, (28, 28)), grid)


@pytest.mark.parametrize(
    "shape, image_size, expected",
    [
        ((2, 64, 5), (32, 128), (4, 16)),  # 64 is a square number, but the image is none
        ((2, 64, 5), (128, 32), (16, 4)),
        ((2, 64, 5), (30, 30), (8, 8)),
        ((2, 36, 5), (30, 100), (3, 12)),  # patches of 8, the rest cut off
        ((2, 52, 5), (30, 100), (4, 13)),  # or filled up
        ((2, 20, 5), (87, 23), (10, 2)),
        ((2, 5, 7, 7), (28, 28), (7, 7)),
        ((2, 7, 7, 5), (28, 28), (7, 7)),  # channels last
        ((2, 7, 7, 8), (28, 28), (7, 7)),  # even where 7 x 8, channels first, would be nearly square
        ((2, 7, 5, 6), (55, 41), (7, 5)),
        ((2, 6, 4, 16), (32, 128), (4, 16)),
        ((2, 4, 16, 64), (32, 128), (16, 64)),  # both readings are possible: channels first
        ((2, 28, 56, 96), (224, 448), (28, 56)),
        ((2, 8, 147, 147), (299, 299), (147, 147)),
        ((2, 8, 97, 197), (200, 400), (97, 197)),  # convolutions without padding
        ((2, 5, 1, 1), (224, 224), (1, 1)),
    ],
)
def test_the_grid_has_the_shape_of_the_image(shape, image_size, expected):
    output = torch.rand(shape)
    found = tokens_to_grid(output, image_size)
    assert found.shape[2:] == expected
    if output.ndim == 3:
        assert torch.equal(found, output.mT.reshape(2, -1, *expected))
    else:
        assert torch.equal(found, output if shape[2:] == expected else output.movedim(3, 1))


@pytest.mark.parametrize(
    "shape, side",
    [
        ((2, 17, 5), 32),
        ((2, 50, 5), 224),
        ((2, 198, 5), 224),
        ((2, 10), 28),
        ((2, 9, 4, 16), 28),
        ((2, 5, 7, 7, 7), 28),
    ],
)
def test_what_is_no_grid_of_the_image_is_refused(shape, side):
    with pytest.raises(ValueError, match=r"not laid out like .*reshape.*class token: lambda tokens: tokens\[:, 1:\]"):
        tokens_to_grid(torch.rand(shape), (side, side))
    with pytest.raises(ValueError, match="not laid out like the 32x128 image"):
        tokens_to_grid(torch.rand(2, 65, 5), (32, 128))


# ---- Against other implementations -----------------------------------------------------------------------------------


class ToGrid(nn.Module):
    """Tokens (N, 49, C) as a map (N, C, 7, 7), which is what captum understands."""

    def forward(self, x):
        return x.transpose(1, 2).unflatten(2, (7, 7))


class ToTokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("layer", ["stem.first", "stem.stage1_0", "stem.down2.0.0", "stem.stage2_0", "blocks.0"])
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
    expected = LayerAttribution.interpolate(expected, (28, 28), interpolate_mode="bilinear")[:, 0].detach()
    assert maps.abs().max() > 0
    totals = expected.sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(maps, expected / totals.clamp_min(1e-20), rtol=1e-4, atol=1e-7)

    def difference(images):
        logits, rows = small_model(images), torch.arange(6)
        return logits[rows, target] - logits[rows, versus]

    expected = LayerGradCam(difference, module).attribute(x)
    expected = LayerAttribution.interpolate(expected, (28, 28), interpolate_mode="bilinear")[:, 0].detach()
    assert contrasts.min() < 0 < contrasts.max()
    totals = expected.abs().sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(contrasts, expected / totals, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam"])  # torchcam's Grad-CAM++ leaves its divisor out
@pytest.mark.parametrize("layer", ["stem.first", "stem.stage2_0"])
def test_every_method_agrees_with_another_implementation(small_model, x, layer, method):
    target = [0, 9, 3, 3, 6, 1]
    module = small_model.get_submodule(layer)
    if method == "hirescam":
        products = LayerGradientXActivation(small_model, module).attribute(x, target=torch.tensor(target))
        expected = products.detach().sum(dim=1).relu()
    else:
        names = {"gradcam": "GradCAM", "layercam": "LayerCAM"}
        with getattr(torchcam, names[method])(small_model, module) as extractor:
            (expected,) = extractor(target, small_model(x), normalized=False)
    expected = F.interpolate(expected[:, None], size=(28, 28), mode="bilinear")[:, 0]
    expected = expected / expected.amax(dim=(1, 2), keepdim=True).clamp_min(1e-20)
    maps = GradCAM(small_model, layer, method)(x, target)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)


# ---- The hooks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_several_layers_give_the_mean_of_their_maps_from_one_pass(small_model, x, method):
    layers = ["stem.first", "stem.stage2_0", "blocks.0"]
    single = torch.stack([GradCAM(small_model, layer, method)(x, 3, normalize=False) for layer in layers])
    some = single.sum(dim=(2, 3))
    torch.testing.assert_close(some, (some > 0.5).float())
    calls = []
    small_model.register_forward_hook(lambda *_: calls.append("forward"))
    maps = GradCAM(small_model, layers[::-1], method)(x, 3, normalize=False)
    expected = single.sum(dim=0) / some.sum(dim=0)[:, None, None].clamp_min(1)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-8)
    assert calls == ["forward"]


@pytest.mark.parametrize("method", METHODS)
def test_swapping_the_two_classes_flips_the_sign_exactly(small_model, x, method):
    with GradCAM(small_model, ["stem.stage1_0", "blocks.0"], method) as cam:
        for normalize in (True, False):
            maps = cam(x, [0, 9, 3, 3, 6, 1], versus=2, normalize=normalize)
            assert torch.equal(maps, -cam(x, 2, versus=[0, 9, 3, 3, 6, 1], normalize=normalize))
            assert maps.abs().amax(dim=(1, 2)).allclose(torch.ones(6)) == normalize
        assert maps.abs().sum(dim=(1, 2)).max() <= 1.00001


def test_hirescam_in_front_of_a_layer_norm_has_no_evidence_and_no_other_map_is_lost(test_split):
    model, _ = load_checkpoint(SHIPPED_CHECKPOINT)
    x = dataset.normalize(test_split[0][:50])
    predicted = model(x).argmax(dim=1)
    assert GradCAM(model, "blocks.0", "hirescam")(x).count_nonzero() == 0
    assert GradCAM(model, "blocks.0", "hirescam")(x, predicted, versus=(predicted + 1) % 10).count_nonzero() == 0
    for method, layers in (("layercam", model.stage_ends()[:2]), ("layercam", "blocks.0"), ("gradcam", "blocks.0")):
        assert GradCAM(model, layers, method)(x).amax(dim=(1, 2)).tolist() == [1] * 50


def test_maps_have_the_promised_shape_type_and_range(small_model, x):
    maps = GradCAM(small_model, "blocks.0")(x)
    assert maps.shape == (6, 28, 28) and maps.dtype == torch.float32 and not maps.requires_grad
    peaks = maps.amax(dim=(1, 2))
    assert maps.min() >= 0 and set(peaks.tolist()) <= {0.0, 1.0} and peaks.max() == 1


def test_the_default_class_is_the_predicted_one_and_each_image_may_have_its_own(small_model, x):
    with GradCAM(small_model, "stem.stage1_0") as cam:
        default = cam(x)
        predicted = cam.logits.argmax(dim=1)
        assert torch.equal(default, cam(x, predicted)) and torch.equal(default, cam(x, predicted.tolist()))
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
    return hooks, [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


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
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in small_model.named_buffers())


def test_it_works_where_gradients_are_switched_off(small_model, x):
    with torch.no_grad():
        maps = GradCAM(small_model, small_model.blocks[0])(x)
    with torch.inference_mode():
        predicted = small_model.eval()(x).argmax(dim=1)
        assert torch.equal(maps, GradCAM(small_model, "blocks.0")(x * 1, predicted))
    assert torch.equal(maps, GradCAM(small_model, "blocks.0")(x, predicted))
    assert torch.equal(maps, GradCAM(small_model, "blocks.0")(x))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_map_without_evidence_is_zero(small_model, x, normalize):
    nn.init.zeros_(small_model.head.weight)
    assert GradCAM(small_model, "stem.first")(x, normalize=normalize).count_nonzero() == 0


def test_an_output_whose_first_dimension_is_not_the_batch_needs_a_reshape():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16)  # takes (tokens, batch, channels)

        def forward(self, images):
            tokens = images.unfold(2, 7, 7).unfold(3, 7, 7).flatten(4).mean(dim=4).flatten(1)  # 16 patches of 7x7
            return self.layer(tokens.T[..., None] * torch.arange(8.0)).mean(dim=0)

    model, images = Encoder(), torch.rand(4, 1, 28, 28)
    with pytest.raises(ValueError, match="not a grid for each of the 4 images"):
        GradCAM(model, "layer")(images)
    assert GradCAM(model, "layer", reshape=lambda x: x.permute(1, 2, 0).unflatten(2, (4, 4)))(images).shape == (
        4,
        28,
        28,
    )


def test_a_layer_with_two_names_is_found_by_either(small_model, x):
    small_model.same_blocks = small_model.blocks
    maps = GradCAM(small_model, "blocks.0")(x)
    assert maps.any() and torch.equal(maps, GradCAM(small_model, "same_blocks.0")(x))


@pytest.mark.parametrize("target", [10, -1, [1, 2], [0.5] * 6, [0, 0, 0, 0, 0, 10]])
def test_impossible_classes_are_refused(small_model, x, target):
    with pytest.raises(ValueError, match="target_class: give"):
        GradCAM(small_model, "blocks.0")(x, target)
    with pytest.raises(ValueError, match="versus: give"):
        GradCAM(small_model, "blocks.0")(x, 0, versus=target)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_has_no_maps(small_model, x, method):
    with GradCAM(small_model, ["stem.first", "blocks.0"], method) as cam:
        assert cam(x[:0]).shape == cam(x[:0], torch.arange(0), versus=3, normalize=False).shape == (0, 28, 28)


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


# ---- Other people's models -------------------------------------------------------------------------------------------


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
    alone = [GradCAM(model, layer, "hirescam")(x, 0, versus=1, normalize=False) for layer in ("first", "branch")]
    both = GradCAM(model, ["first", "branch"], "hirescam")(x, 0, versus=1, normalize=False)
    torch.testing.assert_close(both, sum(alone) / 2)


@pytest.mark.parametrize("layer", ["norm", "features", "features.1"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_channels_last(layer, size):
    torch.manual_seed(0)
    model = models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=5).eval()
    x = torch.rand(2, 3, *size)
    maps = GradCAM(model, layer)(x, 1, normalize=False)
    grids = []

    def reshape(output):
        grids.append(tuple(output.shape[1:3]))
        return output.permute(0, 3, 1, 2)

    assert torch.equal(maps, GradCAM(model, layer, reshape=reshape)(x, 1, normalize=False))
    stride = 4 if layer == "features.1" else 8
    assert set(grids) == {(size[0] // stride, size[1] // stride)} and maps.any(dim=2).any(dim=1).all()


def test_class_tokens_are_refused_with_a_remedy_that_works():
    torch.manual_seed(0)
    model, x = models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5).eval(), torch.rand(2, 3, 32, 32)
    nn.init.normal_(model.heads.head.weight)
    layer = model.encoder.layers.encoder_layer_0
    with pytest.raises(ValueError, match="class token: lambda tokens") as error:
        GradCAM(model, layer)(x)
    remedy = eval(str(error.value).split("class token: ")[1], {"h": 4, "w": 4})
    maps = GradCAM(model, layer, "hirescam", remedy)(x, 1, versus=0)
    products = [LayerGradientXActivation(model, layer).attribute(x, target=label).detach() for label in (0, 1)]
    expected = (products[1] - products[0])[:, 1:].sum(dim=2).view(2, 1, 4, 4)
    expected = F.interpolate(expected, (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(maps, expected / expected.abs().amax(dim=(1, 2), keepdim=True), rtol=1e-3, atol=1e-3)


class Ending(nn.Module):
    """A small convolutional network with another end."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.relu, self.head, self.end = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Linear(4, 3), end

    def forward(self, x):
        return self.end(self, self.relu(self.conv(x)))

    def logits(self, x):
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "end, words",
    [
        (lambda model, x: (model.logits(x), x), "the model returns tuple, not logits"),
        (lambda model, x: {"out": model.logits(x)}, "the model returns dict, not logits"),
        (lambda model, x: model.logits(x)[:, 0], r"the model returns torch.Size\(\[2\]\), not logits"),
        (lambda model, x: x, r"the model returns torch.Size\(\[2, 4, 8, 8\]\), not logits"),
        (lambda model, x: model.logits(x.detach()), "no gradient reaches .* no_grad or detach"),
        (lambda model, x: torch.no_grad()(model.logits)(x), "no gradient reaches .* no_grad or detach"),
        (lambda model, x: model.logits(torch.ones_like(x)), "no gradient reaches .* do not depend"),
    ],
)
def test_models_that_cannot_be_explained_are_refused(end, words):
    model = Ending(end)
    for layers in ("conv", ["conv", "relu"]):
        with pytest.raises(ValueError, match=words):
            GradCAM(model, layers)(torch.rand(2, 1, 8, 8))
    assert model.training and all(p.requires_grad for p in model.parameters()) and not model.conv._forward_hooks


def test_a_detached_first_layer_is_refused_although_a_later_one_has_a_gradient():
    model = Ending(lambda model, x: model.logits(model.relu(x.detach())))
    with pytest.raises(ValueError, match="no gradient reaches"):
        GradCAM(model, ["conv", "relu"])(torch.rand(2, 1, 8, 8))


def test_a_single_logit_is_class_0():
    torch.manual_seed(0)
    model, x = Ending(lambda model, x: model.logits(x)[:, :1]), torch.rand(2, 1, 8, 8)
    maps = GradCAM(model, "relu", "hirescam")(x)
    expected = LayerGradientXActivation(model, model.relu).attribute(x, target=0).sum(dim=1).relu().detach()
    torch.testing.assert_close(maps, expected / expected.amax(dim=(1, 2), keepdim=True).clamp_min(1e-20))
    with pytest.raises(ValueError, match="target_class: give class indices from 0 to 0"):
        GradCAM(model, "relu")(x, 1)


def test_a_compiled_model_has_the_maps_of_the_original(small_model, x):
    compiled = torch.compile(small_model, backend="eager")
    maps = GradCAM(small_model, "blocks.0")(x)
    assert torch.equal(GradCAM(compiled, "blocks.0")(x), maps)
    assert torch.equal(GradCAM(compiled, small_model.blocks[0])(x), maps)
