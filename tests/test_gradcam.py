import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from captum.attr import LayerGradCam, LayerGradientXActivation
from conftest import assert_identical
from torchvision import models

import dataset
from gradcam import GradCAM, shares_of_evidence, tokens_to_grid


@pytest.fixture
def x(test_split):
    return dataset.normalize(test_split[0][:6])


def shares(maps):
    """Maps whose amounts add up to 1."""
    return maps / maps.abs().sum(dim=(1, 2), keepdim=True).clamp_min(1e-20)


# ---- On paper ----


class OnPaper(nn.Module):
    """Layers with given outputs, and logits with given gradients in them."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in layers)
        self.given = layers

    def forward(self, images):
        logits = 0
        for layer, (activation, gradients) in zip(self.layers, self.given, strict=True):
            output = layer(activation.clone())
            terms = [(output * gradient).sum(dim=(1, 2, 3)) for gradient in gradients]
            logits = logits + torch.stack(terms, dim=1)
        return logits


class Made(nn.Module):
    """A small convolutional network whose forward pass is given."""

    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.same, self.head = nn.Identity(), nn.Linear(4, 2)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


# One image, two channels, 2 x 2 places. Mean gradients 1 and -0.5.
ACTIVATION = torch.tensor([[[[1.0, 0.0], [2.0, 4.0]], [[4.0, 2.0], [0.0, 0.0]]]])
GRADIENT = torch.tensor([[[[2.0, 0.0], [0.0, 2.0]], [[-1.0, -2.0], [0.0, 1.0]]]])
IMAGE = torch.zeros(1, 1, 2, 2)


@pytest.mark.parametrize(
    "method, expected, contrast",
    [
        # A_0 - A_1 / 2
        ("gradcam", [[0.0, 0.0], [2.0, 4.0]], [[-1.0, -1.0], [2.0, 4.0]]),
        # 2 - 4, 0 - 4, 0, 8 + 0
        ("hirescam", [[0.0, 0.0], [0.0, 8.0]], [[-2.0, -4.0], [0.0, 8.0]]),
        # without the negative gradients
        ("layercam", [[2.0, 0.0], [0.0, 8.0]], [[-2.0, -4.0], [0.0, 8.0]]),
        # Channel 0: 2 * 2 * 4 / (2 * 4 + 7 * 8); channel 1: 1 / (2 + 6). Of the opposite, channel
        # 0 has no weight, and channel 1 has 1 / (2 + 6) + 2 * 4 / (8 + 48).
        ("gradcam++", [[0.75, 0.25], [0.5, 1.0]], [[0.25 - 4 / 7, -2 / 7], [0.5, 1.0]]),
    ],
)
def test_methods_on_paper(method, expected, contrast):
    gradients = GRADIENT, -GRADIENT.abs(), torch.zeros_like(GRADIENT)
    model = OnPaper((ACTIVATION, gradients))
    expected, contrast = torch.tensor([expected]), torch.tensor([contrast])
    with GradCAM(model, "layers.0", method, reshape=lambda x: x) as cam:
        torch.testing.assert_close(cam(IMAGE, 0), expected / expected.max())
        torch.testing.assert_close(cam(IMAGE, 0, normalize=False), shares(expected))
        assert not cam(IMAGE, 1).any() and not cam(IMAGE, 2).any()
        torch.testing.assert_close(cam(IMAGE, 0, versus=2), contrast / contrast.abs().max())
        torch.testing.assert_close(cam(IMAGE, 0, 2, normalize=False), shares(contrast))
        assert torch.equal(cam(IMAGE, 2, versus=0), -cam(IMAGE, 0, versus=2))


def test_log_odds_are_evidence_for_a_class_against_all_others():
    # Three places give one logit each: 2, -2 and log(3) - 2. Of the others, the second has
    # 1/4 of the probability, the third 3/4. Their gradients are -1/4 and -3/4.
    activation = torch.tensor([[[[2.0, -2.0], [math.log(3) - 2, 0.0]]]])
    gradients = torch.eye(4)[:3].view(3, 1, 1, 2, 2)
    cam = GradCAM(OnPaper((activation, gradients)), "layers.0", "hirescam", log_odds=True)
    expected = torch.tensor([[[2.0, 0.5], [0.75 * (2 - math.log(3)), 0.0]]])
    torch.testing.assert_close(cam(IMAGE, 0, normalize=False), shares(expected))


def grid(*rows):
    return torch.tensor([[rows]])  # one image, one channel


def test_layers_are_averaged_by_their_shares_and_one_without_evidence_is_left_out():
    first = grid([1.0, 3.0], [0.0, 0.0]), (2.0, -1.0)
    model = OnPaper(first, (grid([0.0, 0.0], [0.0, 500.0]), (7.0, 3.0)))
    with GradCAM(model, [model.layers[1], "layers.0"], "hirescam") as cam:
        assert cam(IMAGE, 0, normalize=False).tolist() == [[[0.125, 0.375], [0.0, 0.5]]]
        # the first speaks against the class
        assert cam(IMAGE, 1, normalize=False).tolist() == [[[0.0, 0.0], [0.0, 1.0]]]


@pytest.mark.parametrize("left, some", [(2e-6, False), (5e-5, True), (float("nan"), True)])
def test_what_is_left_over_of_large_terms_is_no_evidence(left, some):
    products = torch.tensor([[[[0.5 + left, 0.0], [0.0, 0.0]], [[-0.5, 0.0], [0.0, 0.0]]]])
    for signed in (False, True):
        maps = shares_of_evidence(products, (6, 6), signed)
        assert maps.any() == some and maps.isnan().any() == (left != left)


# ---- Layouts ----


@pytest.mark.parametrize(
    "shape, image_size, expected",
    [
        ((2, 64, 5), (32, 128), (4, 16)),  # 64 is a square number, but the image is none
        ((2, 7, 5, 6), (55, 41), (7, 5)),  # channels last
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
    "shape, image_size, ways",
    [
        ((2, 20, 5), (28, 28), 0),  # 16 patches and 4 registers, but also 4x5
        ((2, 1, 5), (28, 28), 0),
        ((2, 16, 16, 16), (64, 64), 2),  # channels first and channels last
        ((2, 44, 75, 128), (176, 300), 2),  # 75x128 is 75x127.8 rounded
    ],
)
def test_what_fits_the_image_in_no_way_or_in_two_is_refused(shape, image_size, ways):
    with pytest.raises(ValueError, match=f"in {ways} ways: .*`reshape`"):
        tokens_to_grid(torch.rand(shape), image_size)
    with pytest.raises(ValueError, match="in 0 ways"):  # attention weights
        tokens_to_grid(torch.randn(2, 4, 5, 5).softmax(dim=3), (28, 28))


class Encoder(nn.Module):
    """A transformer's layer on patches of 7x7 pixels, with the batch in dimension 0 or 1."""

    def __init__(self, batch):
        super().__init__()
        self.patches, self.batch = nn.Conv2d(1, 8, 7, stride=7), batch
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch == 0)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT.movedim(0, self.batch)
        return self.layer(tokens).std(dim=1 - self.batch)


def test_the_batch_has_to_come_first():
    first, second, x = Encoder(0), Encoder(1), torch.rand(16, 1, 28, 28)  # of 16 tokens
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="give `reshape`"):
        GradCAM(second, "layer")(x)
    cam = GradCAM(second, "layer", "layercam", lambda t: t.transpose(0, 1).mT.unflatten(2, (4, 4)))
    torch.testing.assert_close(cam(x), GradCAM(first, "layer", "layercam")(x))


def test_a_reshape_that_returns_no_grids_is_refused(small_model, x):
    for reshape in (lambda t: t, lambda t: t[1:].mT.unflatten(2, (7, 7))):
        with pytest.raises(ValueError, match=r"no grid .* of 6 images"):
            GradCAM(small_model, "blocks.0", reshape=reshape)(x)


def test_maps_agree_with_captum(small_model, x):
    target = torch.tensor([0, 9, 3, 3, 6, 1])
    versus = torch.tensor([1, 0, 6, 4, 2, 8])
    module = small_model.stem.down2[0][0]
    cam = GradCAM(small_model, module)
    maps, contrasts = cam(x, target, normalize=False), cam(x, target, versus, normalize=False)

    def difference(images):
        logits, rows = small_model(images), torch.arange(6)
        return logits[rows, target] - logits[rows, versus]

    positive = LayerGradCam(small_model, module).attribute(x, target, relu_attributions=True)
    signed = LayerGradCam(difference, module).attribute(x)
    assert maps.any() and contrasts.min() < 0 < contrasts.max()
    for found, expected in ((maps, positive), (contrasts, signed)):
        expected = F.interpolate(expected, (28, 28), mode="bilinear")[:, 0].detach()
        torch.testing.assert_close(found, shares(expected), rtol=1e-4, atol=1e-7)


# ---- Calls and hooks ----


def test_the_default_class_is_the_predicted_one_and_each_image_may_have_its_own(small_model, x):
    with GradCAM(small_model, "stem.stage1_0") as cam:
        default = cam(x)
        predicted = cam.logits.argmax(dim=1)
        assert not default.requires_grad and not cam.logits.requires_grad
        assert torch.equal(default, cam(x, predicted))
        mixed = cam(x, [2, 2, 2, 5, 5, 5])
        expected = torch.cat([cam(x[:3], 2), cam(x[3:], 5)])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cam.logits, small_model(x)[3:], rtol=1e-4, atol=1e-5)
    assert GradCAM(small_model.bfloat16(), "blocks.0")(x.bfloat16()).dtype == torch.float32


def test_one_forward_and_one_backward_pass_no_further_than_the_first_layer(small_model, x):
    calls = []
    small_model.register_forward_hook(lambda *_: calls.append("forward"))
    for name in ("stem.down2", "blocks.1"):
        module = small_model.get_submodule(name)
        module.register_full_backward_hook(lambda *_, name=name: calls.append(f"backward {name}"))
    GradCAM(small_model, ["norm", "blocks.0"])(x)
    assert calls == ["forward", "backward blocks.1"]
    assert all(parameter.grad is None for parameter in small_model.parameters())


def settings(model):
    hooks = [len(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    return hooks, modes, [weight.requires_grad for weight in model.parameters()]


def test_the_model_is_left_as_it_was_also_after_an_error(small_model, x):
    small_model.train()
    small_model.norm.eval()  # a part in another mode than the whole
    small_model.head.bias.requires_grad_(False)
    before = settings(small_model)
    statistics = {name: buffer.clone() for name, buffer in small_model.named_buffers()}
    with pytest.raises(RuntimeError), GradCAM(small_model, "blocks.1") as cam:
        assert not any(map(any, settings(small_model)[1:]))
        cam(x)
        cam(torch.zeros(2, 3, 28, 28))
    cam(x)  # also of the next call
    assert settings(small_model) == before
    assert_identical(dict(small_model.named_buffers()), statistics)


def test_it_works_where_gradients_are_switched_off(x):
    model = Made(lambda model, x: (model.conv(x) * x).mean(dim=(2, 3)))  # autograd saves x
    cam = GradCAM(model, "conv", "hirescam")
    maps = cam(x, 1)
    assert maps.any()
    with torch.no_grad():
        assert torch.equal(maps, cam(x, 1))
    with torch.inference_mode():
        assert torch.equal(maps, cam(x * 1, torch.ones(6)))


def test_of_a_layer_that_runs_twice_either_run_is_explained_and_either_name_finds_it():
    runs = [(grid([1.0, 3.0], [0.0, 0.0]), (2.0,)), (grid([0.0, 0.0], [0.0, 5.0]), (7.0,))]
    model = OnPaper(*runs)
    model.layers[1] = model.layers[0]
    for run, expected in enumerate(([[0.25, 0.75], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]])):
        for layers in ("layers.0", "layers.1", ["layers.0", "layers.1"]):
            with GradCAM(model, layers, "hirescam", run=run) as cam:
                model(IMAGE)  # counts as no run
                assert cam(IMAGE, 0, normalize=False).tolist() == [expected]
    for run in (None, 2, -1):
        with pytest.raises(ValueError, match=r"returns 2 tensors .*`run` from 0"):
            GradCAM(model, "layers.0", run=run)(IMAGE)


def test_an_empty_batch_has_no_maps(small_model, x):
    with GradCAM(small_model, ["stem.first", "blocks.0"]) as cam:
        assert cam(x[:0]).shape == cam(x[:0], torch.arange(0), versus=3).shape == (0, 28, 28)


@pytest.mark.parametrize("target", [10, -1, [1, 2], [0.5] * 6])
def test_impossible_classes_are_refused(small_model, x, target):
    with pytest.raises(ValueError, match="target_class: give"):
        GradCAM(small_model, "blocks.0")(x, target)
    with pytest.raises(ValueError, match="versus: give"):
        GradCAM(small_model, "blocks.0")(x, 0, versus=target)


@pytest.mark.parametrize(
    "layer, method, words",
    [
        ("blocks.7", "gradcam", r"no layer 'blocks.7'; it has .*blocks.1"),
        (nn.Identity(), "gradcam", r"no layer Identity\(\)"),
        ("head", "gradcam", "fits the 28x28 image in 0 ways"),
        ("blocks", "gradcam", "returns 0 tensors"),
        ("blocks.0", "scam", "'scam' is none of the methods gradcam, .*layercam"),
    ],
)
def test_layers_without_places_and_unknown_names_are_refused(small_model, x, layer, method, words):
    with pytest.raises(ValueError, match=words):
        GradCAM(small_model, layer, method)(x)


# ---- Other people's models ----


def test_a_layer_that_an_in_place_operation_follows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Flatten())
    model.append(nn.Linear(6 * 6 * 6, 2))  # six channels of 6x6: those of a convolution are first
    cam, x = GradCAM(model, "0"), torch.rand(2, 1, 8, 8)
    contrasts = cam(x, 1, versus=0)
    model[1].inplace = False
    assert contrasts.min() < 0
    torch.testing.assert_close(contrasts, cam(x, 1, versus=0))


def test_a_layer_that_hands_on_its_input_has_its_own_gradient():
    def beside_its_input(model, x):
        x = model.conv(x)
        return model.head((5 * x + model.same(x) ** 2).mean(dim=(2, 3)))

    torch.manual_seed(0)
    model, x, maps = Made(beside_its_input), torch.rand(2, 1, 8, 8), []
    for layers in ("conv", "same", ["conv", "same"]):
        maps.append(GradCAM(model, layers, "hirescam")(x, 0, versus=1, normalize=False))
    torch.testing.assert_close(maps[2], (maps[0] + maps[1]) / 2)


def test_patches_behind_a_class_token():
    torch.manual_seed(0)
    model = models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    layer, x = model.encoder.layers.encoder_layer_0, torch.rand(2, 3, 32, 32)
    cam = GradCAM(model, layer, "hirescam", lambda t: t[:, 1:].mT.unflatten(2, (4, 4)))
    maps = cam(x, 1, versus=0, normalize=False)
    captum = LayerGradientXActivation(model, layer)
    products = captum.attribute(x, target=1) - captum.attribute(x, target=0)
    expected = products.detach()[:, 1:].sum(dim=2).view(2, 1, 4, 4)
    expected = F.interpolate(expected, (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(maps, shares(expected), rtol=1e-3, atol=1e-5)


def logits(model, x):
    return model.head(model.conv(x).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "forward, words",
    [
        (lambda model, x: (logits(model, x), x), "returns logits"),
        (lambda model, x: logits(model, x)[:, 0], "returns logits"),
        (torch.no_grad()(logits), "no gradient"),
        (lambda model, x: logits(model, x).detach(), "no gradient"),
    ],
)
def test_models_and_images_that_cannot_be_explained_are_refused(forward, words):
    cam = GradCAM(Made(forward), "conv")
    with pytest.raises(ValueError, match=words):
        cam(torch.rand(2, 1, 8, 8))
    for images in (IMAGE, IMAGE), IMAGE[0]:
        with pytest.raises(ValueError, match=r"one tensor \(N, channels, H, W\)"):
            cam(images)


def test_a_compiled_model_has_the_maps_of_the_original(small_model, x):
    compiled = torch.compile(small_model, backend="eager")
    maps = GradCAM(small_model, "blocks.0")(x)
    assert torch.equal(GradCAM(compiled, small_model.blocks[0])(x), maps)
