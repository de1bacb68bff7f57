"""Grad-CAM and related methods: which places of an image support a class, seen from one layer of the model or several.

    with GradCAM(model, "blocks.0") as cam:
        maps = cam(dataset.normalize(images))   # float32 (N, 28, 28), 0 to 1

One forward pass keeps the layer's activations A (channels k, a small grid of places), one backward pass tells how much
the class score y grows with each of them, G = dy / dA. A method weighs the one by the other, adds up the channels, and
cuts off what speaks against the class. `METHODS` ends with the most faithful one (benchmarks/faithfulness.py).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


def tokens_to_grid(activation: torch.Tensor) -> torch.Tensor:
    """Bring a layer's output to the shape (N, C, H, W); tokens (N, T, C) are laid out row by row as a square grid."""
    if activation.ndim == 4:
        return activation
    if activation.ndim == 3 and math.isqrt(activation.shape[1]) ** 2 == activation.shape[1]:
        n, t, c = activation.shape
        return activation.transpose(1, 2).reshape(n, c, math.isqrt(t), math.isqrt(t))
    raise ValueError(
        f"the target layer's output of shape {tuple(activation.shape)} is neither a map (N, C, H, W) nor a square grid "
        f"of tokens (N, T, C): choose a layer of the stem or an encoder block"
    )


# ---- The methods: activations and gradients (N, C, H, W) -> one map (N, H, W), never negative -----------------------


def gradcam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A channel's weight is its mean gradient: relu(sum_k mean(G_k) A_k).

    Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV,
    arXiv 1610.02391, equations 1 and 2.
    """
    return (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1).relu()


def gradcam_plus_plus(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A channel's weight is a mean over the places where its gradient is positive, each place weighed by curvature.

    Chattopadhay et al. 2018, "Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks", WACV, arXiv
    1710.11063. The score is taken through an exponential, which makes its higher derivatives powers of G.
    """
    curvature = 2 * gradient**2 + activation.sum(dim=(2, 3), keepdim=True) * gradient**3
    share = gradient**2 / torch.where(curvature == 0, torch.ones_like(curvature), curvature)
    weight = (share * gradient.relu()).sum(dim=(2, 3), keepdim=True)
    return (weight * activation).sum(dim=1).relu()


def hirescam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Every place has its own weight, its gradient: relu(sum_k G_k A_k).

    Draelos & Carin 2020, "Use HiResCAM instead of Grad-CAM for faithful explanations", arXiv 2011.08891.
    """
    return (gradient * activation).sum(dim=1).relu()


def layercam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """As HiResCAM, with positive gradients alone, which early layers' noisy gradients need: relu(sum_k relu(G_k) A_k).

    Jiang et al. 2021, "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE TIP 30.
    """
    return (gradient.relu() * activation).sum(dim=1).relu()


METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "layercam": layercam,
}


# ---- The hooks ------------------------------------------------------------------------------------------------------


class GradCAM:
    """Heatmaps from one layer of a model, or the mean of several layers' heatmaps.

    In a `with` block, or during a single call, the model has one forward hook per layer, is in evaluation mode, and its
    parameters do not require gradients. On the way out, also after an error, all three are as they were. `logits` holds
    those of the latest call, (N, classes), detached.

    Args:
        model: maps a float tensor (N, 1, H, W) to logits (N, classes).
        target_layer: a module of `model` or its name, like "blocks.0", or a sequence of them.
        method: a key of `METHODS`.
        reshape: turns a layer's output into (N, C, H', W').

    Raises:
        ValueError: there is no such layer, method or class, or the layer has no part in the answer, or no places.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: str | nn.Module | Sequence[str | nn.Module],
        method: str = "gradcam",
        reshape: Callable[[torch.Tensor], torch.Tensor] = tokens_to_grid,
    ) -> None:
        layers = dict(model.named_modules())
        self.target_layers: list[nn.Module] = []
        for layer in [target_layer] if isinstance(target_layer, (str, nn.Module)) else target_layer:
            if isinstance(layer, str):
                if not layer or layer not in layers:
                    raise ValueError(f"the model has no layer {layer!r}; it has {', '.join(filter(None, layers))}")
                layer = layers[layer]
            elif not any(layer is module for module in layers.values()):
                raise ValueError("target_layer is not a part of the model")
            self.target_layers.append(layer)
        if not self.target_layers:
            raise ValueError("target_layer names no layer")
        if method not in METHODS:
            raise ValueError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
        self.model, self.method, self.reshape = model, METHODS[method], reshape
        self.logits: torch.Tensor | None = None
        self._activations: dict[nn.Module, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def _keep_activation(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise ValueError(f"the target layer returns a {type(output).__name__}, not a tensor: choose another layer")
        if not output.requires_grad:
            # The first layer's activation is where autograd's graph begins: nothing is recorded, and nothing
            # differentiated, between the image and this layer. Later layers lie on that graph already.
            output = output.detach().requires_grad_()
        self._activations[module] = output
        return output

    def __enter__(self) -> "GradCAM":
        if self._hooks:
            raise RuntimeError("this GradCAM is already in use")
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self._hooks = [layer.register_forward_hook(self._keep_activation) for layer in self.target_layers]
        self.model.eval().requires_grad_(False)
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._activations = [], {}
        for module, training in self._modes:
            module.training = training
        for parameter, requires_grad in self._flags:
            parameter.requires_grad_(requires_grad)

    def __call__(
        self,
        images: torch.Tensor,
        target_class: int | Sequence[int] | torch.Tensor | None = None,
        normalize: bool = True,
    ) -> torch.Tensor:
        """Heatmaps of a batch: one forward pass, one backward pass as far as the first of the target layers.

        Args:
            images: float tensor (N, 1, H, W) as the model takes it.
            target_class: the class to explain, one for all images or one for each; None takes the predicted ones.
            normalize: divide each map by its maximum. A map of zeros, where nothing speaks for the class, stays so.

        Returns:
            float32 (N, H, W) on the images' device, from 0 to 1; with `normalize=False` from 0 upwards, in logits per
            pixel: a place's value, shared among the pixels that it covers. In this unit layers are averaged.
        """
        if not self._hooks:
            with self:
                return self(images, target_class, normalize)
        self._activations = {}
        with torch.inference_mode(False), torch.enable_grad():
            # Autograd takes no tensor that was made in inference mode, but takes a copy of it.
            logits = self.model(images.clone() if images.is_inference() else images.detach())
            if any(layer not in self._activations for layer in self.target_layers):
                raise ValueError("the model's forward pass does not go through the target layer: choose another layer")
            activations = [self._activations[layer] for layer in self.target_layers]
            self.logits = logits.detach()
            target = self._targets(target_class)
            # An image's score depends on its own activations alone, so the gradient of the sum holds every image's.
            score = logits.gather(1, target[:, None]).sum()
            gradients = torch.autograd.grad(score, activations, allow_unused=True)
        size, maps = images.shape[-2:], 0
        for activation, gradient in zip(activations, gradients, strict=True):
            if gradient is None:
                raise ValueError("the logits do not depend on the target layer's output: choose another layer")
            places = self.method(self.reshape(activation.detach()).float(), self.reshape(gradient).float())[:, None]
            pixels_per_place = math.prod(size) / math.prod(places.shape[-2:])
            layer_maps = F.interpolate(places, size=size, mode="bilinear", align_corners=False).squeeze(1)
            maps = maps + layer_maps / pixels_per_place / len(activations)
        if normalize:
            maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        return maps

    def _targets(self, target_class: int | Sequence[int] | torch.Tensor | None) -> torch.Tensor:
        """One class index per image, int64 of shape (N,)."""
        n, classes = self.logits.shape
        if target_class is None:
            return self.logits.argmax(dim=1)
        target = torch.as_tensor(target_class, device=self.logits.device)
        if target.is_floating_point() or target.shape not in ((), (n,)):
            raise ValueError(f"target_class: give one class index, or one for each of the {n} images")
        if n and not (0 <= int(target.min()) and int(target.max()) < classes):
            raise ValueError(f"target_class: give class indices from 0 to {classes - 1}")
        return target.long().expand(n)
