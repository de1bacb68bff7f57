"""Grad-CAM and related methods: which places of an image support a class, seen from one layer of the model or several.

    with GradCAM(model, "blocks.0") as cam:
        maps = cam(dataset.normalize(images))   # float32 (N, 28, 28), 0 to 1

One forward pass keeps the layer's activations A (channels k, a small grid of places), one backward pass tells how much
the class score y grows with each of them, G = dy / dA. A method turns both into weights w, and the map is
relu(sum_k w_k A_k): the channels added up, and evidence against the class cut off. Which of the `METHODS` is the
most faithful is measured in benchmarks/faithfulness.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

# A map's sum, as a fraction of the sum of its terms' sizes; anything below this is no evidence. HiResCAM in front of
# a layer norm, whose output does not grow when its whole input does, is left with 3e-6 from rounding and the norm's
# epsilon. The shipped model's faintest Grad-CAM of 1,000 test images has 8e-5.
LEAST_EVIDENCE = 1e-5
Classes = int | Sequence[int] | torch.Tensor | None  # one for all images, or one for each


def tokens_to_grid(activation: torch.Tensor, image_size: Sequence[int]) -> torch.Tensor:
    """Bring a layer's output to the shape (N, C, h, w), where h x w has the proportions of `image_size`, (H, W).

    It may be (N, C, h, w), or else (N, h, w, C), or tokens (N, h * w, C) that are laid out row by row.
    """
    (height, width), grids = image_size, []
    if activation.ndim == 4:
        grids = [activation, activation.permute(0, 3, 1, 2)]
    elif activation.ndim == 3:
        tokens = activation.shape[1]
        short = max(1, round((tokens * min(image_size) / max(image_size)) ** 0.5))
        h, w = (short, tokens // short) if height < width else (tokens // short, short)
        grids = [activation.mT.unflatten(2, (h, w))] if h * w == tokens else []
    # In the image's proportions, h * W = w * H; strides and borders that round move a side by less than two places.
    for slack in (1, 2 * max(height, width)):
        for grid in grids:
            if abs(grid.shape[2] * width - grid.shape[3] * height) < slack:
                return grid
    raise ValueError(
        f"the target layer's output {tuple(activation.shape)} is not laid out like the {height}x{width} image: choose "
        "another layer, or give `reshape`; with a class token: lambda tokens: tokens[:, 1:].mT.unflatten(2, (h, w))"
    )


# ---- The methods: activations and gradients (N, C, h, w) -> weights that are multiplied with the activations ---------


def gradcam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A channel's weight is its mean gradient, (N, C, 1, 1): the map is relu(sum_k mean(G_k) A_k).

    Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV,
    arXiv 1610.02391, equations 1 and 2.
    """
    return gradient.mean(dim=(2, 3), keepdim=True)


def gradcam_plus_plus(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A channel's weight, (N, C, 1, 1), is a sum of its positive gradients, each place weighted by curvature.

    Chattopadhay et al. 2018, "Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep Convolutional
    Networks", WACV, arXiv 1710.11063. The score is taken through an exponential, which makes its higher derivatives
    powers of G.
    """
    curvature = 2 * gradient**2 + activation.sum(dim=(2, 3), keepdim=True) * gradient**3
    share = gradient**2 / torch.where(curvature == 0, torch.ones_like(curvature), curvature)
    return (share * gradient.relu()).sum(dim=(2, 3), keepdim=True)


def hirescam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Every place has its own weight, its gradient: the map is relu(sum_k G_k A_k).

    Draelos & Carin 2020, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks",
    arXiv 2011.08891.
    """
    return gradient


def layercam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """As HiResCAM, with positive gradients alone, which early layers' noisy gradients need: relu(sum_k relu(G_k) A_k).

    Jiang et al. 2021, "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE TIP 30. They join
    layers by the largest value at each place, after a tanh; `GradCAM` takes the mean.
    """
    return gradient.relu()


METHODS = {"gradcam": gradcam, "gradcam++": gradcam_plus_plus, "hirescam": hirescam, "layercam": layercam}


def shares_of_evidence(products: torch.Tensor, size: Sequence[int], signed: bool) -> torch.Tensor:
    """Maps (N, *size) of shares, from weighted channels (N, C, h, w); what is negative is cut off unless `signed`."""
    places = products.sum(dim=1, keepdim=True)
    maps = F.interpolate(places if signed else places.relu(), size=size, mode="bilinear", align_corners=False)[:, 0]
    amounts = maps.abs()
    # Means, as there are more pixels than places. Written so that a map of NaN stays one.
    empty = amounts.mean(dim=(1, 2)) <= LEAST_EVIDENCE * products.abs().sum(dim=1).mean(dim=(1, 2))
    return torch.where(empty[:, None, None], 0, maps / amounts.sum(dim=(1, 2), keepdim=True))


# ---- The hooks ------------------------------------------------------------------------------------------------------


class GradCAM:
    """Heatmaps from one layer of a model, or the mean of several layers' heatmaps.

    In a `with` block, or during a single call, the model has one forward hook per layer, is in evaluation mode, and its
    parameters do not require gradients. On the way out, also after an error, all three are as they were. `logits` holds
    those of the latest call, (N, classes), detached.

    Args:
        model: maps a float tensor (N, channels, H, W) to logits (N, classes). A compiled one runs uncompiled.
        target_layer: a module of `model` or its name, like "blocks.0", or a sequence of them. Of a layer that runs
            several times, the last run counts. If a vision transformer reads only its class token, no gradient reaches
            the patches after the last attention: take what goes into it, like the last block's first norm.
        method: a key of `METHODS`.
        reshape: turns a layer's output into (N, C, h, w); None is `tokens_to_grid` with the image's size.

    Raises:
        ValueError: a layer, method, class or model that is not there or cannot be explained; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: str | nn.Module | Sequence[str | nn.Module],
        method: str = "gradcam",
        reshape: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper calls no hooks either
        layers = dict(model.named_modules(remove_duplicate=False))
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
        # Autograd's graph begins here, with the first layer's activation; later layers lie on that graph already. The
        # model goes on with a copy, as its next operation may be in place.
        self._activations[module] = output.clone().requires_grad_()
        return self._activations[module].clone()

    def __enter__(self) -> "GradCAM":
        if self._hooks:
            raise RuntimeError("this GradCAM is already in use")
        self._switched_off = [(module, "training") for module in self.model.modules() if module.training]
        self._switched_off += [(weight, "requires_grad") for weight in self.model.parameters() if weight.requires_grad]
        for part, flag in self._switched_off:
            setattr(part, flag, False)
        self._hooks = [layer.register_forward_hook(self._keep_activation) for layer in self.target_layers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._activations = [], {}
        for part, flag in self._switched_off:
            setattr(part, flag, True)

    def __call__(
        self, images: torch.Tensor, target_class: Classes = None, versus: Classes = None, normalize: bool = True
    ) -> torch.Tensor:
        """Heatmaps of a batch: one forward pass, one backward pass as far as the first of the target layers.

        With `versus`, y is the difference of two classes' logits, and the map is signed: sum_k w_k A_k, where w is the
        method's weight for y minus that for -y. Of published methods Finer-CAM is the nearest (Zhang et al. 2025, arXiv
        2501.11309): the positive part of a map, by default Grad-CAM's, of a logit minus a mean of similar classes'.

        Args:
            images: float tensor (N, channels, H, W) as the model takes it.
            target_class: the class to explain; None takes the predicted ones.
            versus: the class that it is compared with; None compares with none.
            normalize: divide each map by its largest amount. A map of zeros, where there is no evidence, stays so.

        Returns:
            float32 (N, H, W) on the images' device, from 0 to 1; with `versus` from -1 to 1, positive where a place
            supports `target_class`, negative where it supports `versus`. With `normalize=False` shares of the
            evidence, which have no unit: the mean of the layers' maps, each of whose amounts add up to 1. A layer
            without evidence is left out; where no layer has any, the map is zeros.
        """
        if not self._hooks:
            with self:
                return self(images, target_class, versus, normalize)
        self._activations = {}
        with torch.inference_mode(False), torch.enable_grad():
            # Autograd takes no tensor that was made in inference mode, but takes a copy of it.
            logits = self.model(images.clone() if images.is_inference() else images.detach())
            if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
                found = getattr(logits, "shape", type(logits).__name__)
                raise ValueError(f"the model returns {found}, not logits (N, classes): wrap it in a module that does")
            if any(layer not in self._activations for layer in self.target_layers):
                raise ValueError("the model's forward pass does not go through the target layer: choose another layer")
            activations = [self._activations[layer] for layer in self.target_layers]
            self.logits = logits.detach()
            target = self.logits.argmax(dim=1) if target_class is None else self._classes("target_class", target_class)
            score = logits.gather(1, target[:, None])
            if versus is not None:
                score = score - logits.gather(1, self._classes("versus", versus)[:, None])
            # An image's score depends on its own activations alone, so the gradient of the sum holds every image's.
            gradients = None
            if score.requires_grad:
                gradients = torch.autograd.grad(score.sum(), activations, allow_unused=True)
        if not gradients or any(gradient is None for gradient in gradients):
            raise ValueError(
                "no gradient reaches the target layer: the logits do not depend on it, or no_grad or detach cuts it off"
            )
        size, shares = images.shape[-2:], []
        reshape = self.reshape or (lambda output: tokens_to_grid(output, size))
        for activation, gradient in zip(activations, gradients, strict=True):
            activation, gradient = reshape(activation.detach()).float(), reshape(gradient).float()
            if len(activation) != len(images):
                raise ValueError(
                    f"the target layer's output is not a grid for each of the {len(images)} images: choose another "
                    "layer, or give `reshape`; with the batch second: lambda x: x.permute(1, 2, 0).unflatten(2, (h, w))"
                )
            weight = self.method(activation, gradient)
            if versus is not None:
                weight = weight - self.method(activation, -gradient)
            shares.append(shares_of_evidence(weight * activation, size, signed=versus is not None))
        shares = torch.stack(shares)  # (layers, N, H, W)
        maps = shares.sum(dim=0) / shares.any(dim=(2, 3)).sum(dim=0).clamp_min(1)[:, None, None]
        if normalize:
            maps = maps / maps.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        return maps

    def _classes(self, name: str, given: Classes) -> torch.Tensor:
        """One class index per image, int64 of shape (N,)."""
        n, classes = self.logits.shape
        chosen = torch.as_tensor(given, device=self.logits.device)
        if chosen.is_floating_point() or chosen.shape not in ((), (n,)):
            raise ValueError(f"{name}: give one class index, or one for each of the {n} images")
        if n and not (0 <= int(chosen.min()) and int(chosen.max()) < classes):
            raise ValueError(f"{name}: give class indices from 0 to {classes - 1}")
        return chosen.long().expand(n).clone()  # autograd saves it, which it refuses for one of inference mode
