import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from captum.attr import LayerAttribution, LayerGradCam, LayerGradientXActivation
from torchcam import methods as torchcam

import dataset
from gradcam import METHODS, GradCAM, tokens_to_grid


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
    assert METHODS[method](ACTIVATION, GRADIENT).tolist() == [expected]
    # Where only negative gradients meet activations that are not negative, nothing speaks for the class.
    assert METHODS[method](ACTIVATION, -GRADIENT.abs()).count_nonzero() == 0
    assert METHODS[method](ACTIVATION, torch.zeros_like(GRADIENT)).count_nonzero() == 0


def test_tokens_are_laid_out_row_by_row():
    tokens = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
    grid = tokens_to_grid(tokens)
    assert grid.shape == (2, 4, 3, 3)
    assert torch.equal(grid[:, :, 1, 2], tokens[:, 5])
    assert torch.equal(tokens_to_grid(grid), grid)


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
    maps = GradCAM(small_model, layer)(x, target, normalize=False)
    module = small_model.get_submodule(layer)
    if layer.startswith("blocks"):
        grid = ToGrid()
        small_model.blocks[0] = nn.Sequential(module, grid, ToTokens())
        module = grid
    expected = LayerGradCam(small_model, module).attribute(x, target=target, relu_attributions=True)
    pixels_per_place = 28 * 28 / expected[0].numel()
    expected = LayerAttribution.interpolate(expected, (28, 28), interpolate_mode="bilinear")[:, 0]
    assert maps.abs().max() > 0
    torch.testing.assert_close(maps * pixels_per_place, expected.detach(), rtol=1e-5, atol=1e-5)


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
    layers = ["stem.first", "stem.stage2_0", "blocks.1"]
    single = [GradCAM(small_model, layer, method)(x, 3, normalize=False) for layer in layers]
    calls = []
    small_model.register_forward_hook(lambda *_: calls.append("forward"))
    maps = GradCAM(small_model, layers[::-1], method)(x, 3, normalize=False)
    torch.testing.assert_close(maps, sum(single) / 3, rtol=1e-4, atol=1e-8)
    assert calls == ["forward"]


def test_a_positive_scale_of_the_map_is_evidence_in_logits(small_model, x):
    # Gradient times activation of the pooled layer's input adds up to the logit, up to the bias: the unit is right.
    small_model.blocks, small_model.norm = nn.ModuleList(), nn.Identity()
    small_model.pool.score = None
    nn.init.ones_(small_model.head.weight)
    nn.init.zeros_(small_model.pos_embed)
    with GradCAM(small_model, "stem", "hirescam") as cam:
        evidence = cam(x, 0, normalize=False).sum(dim=(1, 2))
        torch.testing.assert_close(evidence, cam.logits[:, 0], rtol=1e-4, atol=1e-5)


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
        assert torch.equal(maps, GradCAM(small_model, "blocks.0")(x * 1))
    assert torch.equal(maps, GradCAM(small_model, "blocks.0")(x))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_map_without_evidence_is_zero(small_model, x, normalize):
    nn.init.zeros_(small_model.head.weight)
    assert GradCAM(small_model, "stem.first")(x, normalize=normalize).count_nonzero() == 0


@pytest.mark.parametrize("target", [10, -1, [1, 2], [0.5] * 6, [0, 0, 0, 0, 0, 10]])
def test_impossible_classes_are_refused(small_model, x, target):
    with pytest.raises(ValueError, match="target_class"):
        GradCAM(small_model, "blocks.0")(x, target)


def test_layers_without_places_and_unknown_names_are_refused(small_model, x):
    with pytest.raises(ValueError, match=r"no layer 'blocks.7'; it has .*blocks.1"):
        GradCAM(small_model, "blocks.7")
    with pytest.raises(ValueError, match="not a part of the model"):
        GradCAM(small_model, nn.Identity())
    with pytest.raises(ValueError, match="neither a map"):
        GradCAM(small_model, "head")(x)
    with pytest.raises(ValueError, match="does not go through"):
        GradCAM(small_model, "blocks")(x)
    with pytest.raises(ValueError, match="names no layer"):
        GradCAM(small_model, [])
    with pytest.raises(ValueError, match=r"no method 'scam'; there are gradcam, .*layercam"):
        GradCAM(small_model, "blocks.0", "scam")
