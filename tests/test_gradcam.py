import pytest
import torch
import torch.nn as nn
from captum.attr import LayerAttribution, LayerGradCam

import dataset
from gradcam import GradCAM


@pytest.fixture
def x(test_split):
    return dataset.normalize(test_split[0][:6])


class ToGrid(nn.Module):
    """Tokens (N, 49, C) as a map (N, C, 7, 7), which is what captum understands."""

    def forward(self, x):
        return x.transpose(1, 2).unflatten(2, (7, 7))


class ToTokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    "layer", ["stem.first", "stem.down1", "stem.stage1_0", "stem.down2.0.0", "stem.stage2_0", "blocks.0", "blocks.1"]
)
def test_maps_agree_with_captum(small_model, x, layer):
    target = torch.tensor([0, 9, 3, 3, 6, 1])
    maps = GradCAM(small_model, layer)(x, target, normalize=False)
    module = small_model.get_submodule(layer)
    if layer.startswith("blocks"):
        grid = ToGrid()
        small_model.blocks[int(layer[-1])] = nn.Sequential(module, grid, ToTokens())
        module = grid
    expected = LayerGradCam(small_model, module).attribute(x, target=target, relu_attributions=True)
    expected = LayerAttribution.interpolate(expected, (28, 28), interpolate_mode="bilinear")[:, 0]
    assert maps.abs().max() > 0
    torch.testing.assert_close(maps, expected.detach(), rtol=1e-5, atol=1e-5)


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


def test_a_map_without_evidence_is_zero(small_model, x):
    nn.init.zeros_(small_model.head.weight)
    assert GradCAM(small_model, "blocks.1")(x).count_nonzero() == 0


@pytest.mark.parametrize("target", [10, -1, [1, 2], [0.5] * 6, [0, 0, 0, 0, 0, 10]])
def test_impossible_classes_are_refused(small_model, x, target):
    with pytest.raises(ValueError, match="target_class"):
        GradCAM(small_model, "blocks.0")(x, target)


def test_layers_without_places_are_refused(small_model, x):
    with pytest.raises(ValueError, match=r"no layer 'blocks.7'; it has .*blocks.1"):
        GradCAM(small_model, "blocks.7")
    with pytest.raises(ValueError, match="not a part of the model"):
        GradCAM(small_model, nn.Identity())
    with pytest.raises(ValueError, match="neither a map"):
        GradCAM(small_model, "head")(x)
    with pytest.raises(ValueError, match="does not go through"):
        GradCAM(small_model, "blocks")(x)
