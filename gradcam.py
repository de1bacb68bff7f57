"""Grad-CAM: which places of an image speak for a class, seen from one layer of the model.

    with GradCAM(model, "blocks.0") as cam:
        maps = cam(dataset.normalize(images))   # float32 (N, 28, 28), 0 to 1

The layer's activations A_k (channel k, a small grid of places) are weighed by how much the class score y_c grows with
them on average, added up, and what speaks against the class is cut off (Selvaraju et al. 2017, "Grad-CAM: Visual
Explanations from Deep Networks via Gradient-based Localization", ICCV, arXiv 1610.02391, equations 1 and 2):

    alpha_k = mean over places of  d y_c / d A_k          map = relu( sum over k of  alpha_k A_k )
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


def tokens_to_grid(activation: torch.Tensor) -> torch.Tensor:
    """Bring a layer's output to the shape (N, C, H, W).

    Convolutional maps have it; a token sequence (N, T, C) is laid out row by row as a square grid.

    Raises:
        ValueError: the output is neither, so it has no places to show.
    """
    if activation.ndim == 4:
        return activation
    if activation.ndim == 3 and math.isqrt(activation.shape[1]) ** 2 == activation.shape[1]:
        n, t, c = activation.shape
        return activation.transpose(1, 2).reshape(n, c, math.isqrt(t), math.isqrt(t))
    raise ValueError(
        f"the target layer's output of shape {tuple(activation.shape)} is neither a map (N, C, H, W) nor a square grid "
        f"of tokens (N, T, C): choose a layer of the stem or an encoder block"
    )


class GradCAM:
    """Grad-CAM of one layer of a model.

    In a `with` block, or during a single call, the model has one forward hook, is in evaluation mode, and its
    parameters ask for no gradient. On the way out, also after an error, all three are as they were.

    Args:
        model: maps a float tensor (N, 1, H, W) to logits (N, classes).
        target_layer: a module of `model`, or its name as `model.named_modules()` gives it, like "blocks.0".
        reshape: turns the layer's output into (N, C, H', W').

    Attributes:
        logits: those of the latest call, (N, classes), detached.

    Raises:
        ValueError: `target_layer` is not in `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: str | nn.Module,
        reshape: Callable[[torch.Tensor], torch.Tensor] = tokens_to_grid,
    ) -> None:
        layers = dict(model.named_modules())
        if isinstance(target_layer, str):
            if not target_layer or target_layer not in layers:
                raise ValueError(f"the model has no layer {target_layer!r}; it has {', '.join(filter(None, layers))}")
            target_layer = layers[target_layer]
        elif not any(target_layer is layer for layer in layers.values()):
            raise ValueError("target_layer is not a part of the model")
        self.model, self.target_layer, self.reshape = model, target_layer, reshape
        self.logits: torch.Tensor | None = None
        self._activation: torch.Tensor | None = None
        self._hook: Any = None

    def _keep_activation(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # Cut off from what lies before it, the activation is where autograd's graph begins: nothing is recorded, and
        # nothing differentiated, between the image and the target layer.
        if not isinstance(output, torch.Tensor):
            raise ValueError(f"the target layer returns a {type(output).__name__}, not a tensor: choose another layer")
        self._activation = output.detach().requires_grad_()
        return self._activation

    def __enter__(self) -> "GradCAM":
        if self._hook is not None:
            raise RuntimeError("this GradCAM is already in use")
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self._hook = self.target_layer.register_forward_hook(self._keep_activation)
        self.model.eval().requires_grad_(False)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        self._hook = self._activation = None
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
        """Heatmaps of a batch: one forward pass, one backward pass as far as the target layer.

        Args:
            images: float tensor (N, 1, H, W) as the model takes it.
            target_class: the class to explain, one for all images or one for each; None takes the predicted ones.
            normalize: divide each map by its maximum. A map of zeros, where nothing speaks for the class, stays so.

        Returns:
            float32 tensor (N, H, W) on the images' device, from 0 to 1; with `normalize=False` from 0 upwards, in units
            of the logit.

        Raises:
            ValueError: a class that does not exist, not one class per image, a layer without places, or one that the
                forward pass does not go through.
        """
        if self._hook is None:
            with self:
                return self(images, target_class, normalize)
        self._activation = None
        with torch.inference_mode(False), torch.enable_grad():
            # Autograd takes no tensor that was made in inference mode, but takes a copy of it.
            logits = self.model(images.clone() if images.is_inference() else images)
            if self._activation is None:
                raise ValueError("the model's forward pass does not go through the target layer: choose another layer")
            self.logits = logits.detach()
            target = self._targets(target_class)
            # An image's score depends on its own activations alone, so the gradient of the sum holds every image's.
            score = logits.gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, self._activation, allow_unused=True)
        if gradient is None:
            raise ValueError("the logits do not depend on the target layer's output: choose another layer")
        activation, gradient = self.reshape(self._activation.detach()).float(), self.reshape(gradient).float()
        alpha = gradient.mean(dim=(2, 3), keepdim=True)
        maps = (alpha * activation).sum(dim=1, keepdim=True).relu()
        maps = F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)
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
