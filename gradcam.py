"""Grad-CAM and related methods: which places of an image support a class, seen from some layer.

    with GradCAM(model, "blocks.0") as cam:
        maps = cam(dataset.normalize(images))   # float32 (N, 28, 28), 0 to 1

One forward pass keeps the layer's activations A (channels k, a small grid of places), one backward
pass tells how the class score y grows with each of them, G = dy / dA. A method turns both into
weights w, and the map is relu(sum_k w_k A_k): evidence against the class is cut off.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

# A map's sum, as a part of its terms' sizes; less is no evidence. Rounding leaves 3e-6 of HiResCAM
# in front of a layer norm; the faintest of 1,000 maps of the shipped model has 8e-5.
LEAST_EVIDENCE = 1e-5
Classes = int | Sequence[int] | torch.Tensor | None  # one for all images, or one for each
TOKENS_RESHAPE = (
    "with `extra` class or register tokens: lambda t: t[:, extra:].mT.unflatten(2, (h, w))"
)


def tokens_to_grid(
    activation: torch.Tensor, image_size: Sequence[int], channels: Sequence[int] = (1, 3)
) -> torch.Tensor:
    """Bring a layer's output to the shape (N, C, h, w) of the proportions of `image_size`, (H, W).

    It may be (N, C, h, w), (N, h, w, C), or tokens (N, h * w, C), row by row. Of an oblong image,
    the grid may be two places off, as strides round; that of tokens may not.

    A shape does not tell everything: 16 patches and 9 registers look like 25 patches, (N, C, T)
    like (N, T, C) where C is a square, and queries (N, heads, T, d) like a grid where T = d. Such
    an output needs a `reshape`. `channels` are the dimensions of a 4-D output that may be them.

    Raises:
        ValueError: no reading of the shape, or more than one, has the image's proportions.
    """
    (height, width), grids, slack = image_size, [], 1
    if activation.ndim == 4:
        grids = [activation.movedim(dimension, 1) for dimension in channels]
        slack = 1 if height == width else 2 * max(height, width)
    elif activation.ndim == 3:
        tokens = activation.shape[1]
        h = max(1, round((tokens * height / width) ** 0.5))
        w = tokens // h
        # A single token is a class token, or a mean.
        grids = [activation.mT.unflatten(2, (h, w))] if h * w == tokens > 1 else []
    grids = [grid for grid in grids if abs(grid.shape[2] * width - grid.shape[3] * height) < slack]
    if len(grids) == 1:
        return grids[0]
    found = "in two ways" if grids else "not"
    raise ValueError(
        f"the target layer's output {tuple(activation.shape)} is {found} laid out like the "
        f"{height}x{width} image: choose another layer, or give `reshape`. If it is (N, C, h, w): "
        "lambda x: x; if it is (N, h, w, C): lambda x: x.permute(0, 3, 1, 2); " + TOKENS_RESHAPE
    )


def channel_dimensions(layer: nn.Module) -> tuple[int, ...]:
    """The dimensions of a layer's 4-D output that may be the channels: one, if its kind tells."""
    kind = type(layer)
    if kind.__module__.startswith("torch.nn.") and kind.__name__.endswith("2d"):
        return (1,)  # convolutions, batch norms, pooling
    if kind in (nn.LayerNorm, nn.RMSNorm) and len(layer.normalized_shape) == 1:
        return (3,)
    return (1, 3)


def described(value: object) -> str:
    """What a message says of a value that is not what it should be."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def check_output(output: torch.Tensor, score: torch.Tensor, n: int) -> None:
    """Refuse an output of another batch than the n scores, (n, 1), and attention weights."""
    found = f"the target layer's output {tuple(output.shape)}"
    batch_first = output.shape[:1] == (n,)
    if output.ndim == 3 and output.shape[0] == output.shape[1] == len(score) > 1:
        # Tokens (T, N, C) look like (N, T, C) where T = N, but a score depends on all rows.
        (gradient,) = torch.autograd.grad(
            score[0].sum(), output, retain_graph=True, allow_unused=True
        )
        batch_first = gradient is None or not gradient[1:].any()
    if not batch_first:
        raise ValueError(
            f"{found} is not a grid for each of the {n} images: choose another layer, or give "
            "`reshape`; with the batch second, after `extra` class or register tokens: "
            "lambda t: t[extra:].permute(1, 2, 0).unflatten(2, (h, w))"
        )
    if n and output.ndim > 2 and output.shape[-1] == output.shape[-2] > 1:
        rows = output.detach()[(0,) * (output.ndim - 2)].float()  # one matrix tells
        if rows.min() >= 0 and (rows.sum(dim=1) - 1).abs().max() < 0.01:
            raise ValueError(
                f"{found} is attention weights, as its rows add up to 1: choose another layer, or "
                "give `reshape`; for what a class token in front attends to: "
                "lambda a: a[:, :, 0, 1:].unflatten(2, (h, w))"
            )


# ---- The methods: activations and gradients (N, C, h, w) -> weights ------------------------------


def gradcam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A channel's weight is its mean gradient, (N, C, 1, 1).

    Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2.
    """
    return gradient.mean(dim=(2, 3), keepdim=True)


def gradcam_plus_plus(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A channel's weight, (N, C, 1, 1), sums its positive gradients, weighted by curvature.

    Chattopadhay et al. 2018, arXiv 1710.11063. The score is taken through an exponential, which
    makes its higher derivatives powers of G.
    """
    curvature = 2 * gradient**2 + activation.sum(dim=(2, 3), keepdim=True) * gradient**3
    share = gradient**2 / torch.where(curvature == 0, torch.ones_like(curvature), curvature)
    return (share * gradient.relu()).sum(dim=(2, 3), keepdim=True)


def hirescam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Every place has its own weight, its gradient (Draelos & Carin 2020, arXiv 2011.08891)."""
    return gradient


def layercam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """As HiResCAM, without negative gradients, which are noisy in early layers.

    Jiang et al. 2021, "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization",
    IEEE TIP 30. They join layers by the largest value at each place, after a tanh; `GradCAM` takes
    the mean.
    """
    return gradient.relu()


METHODS = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "layercam": layercam,
}


def shares_of_evidence(products: torch.Tensor, size: Sequence[int], signed: bool) -> torch.Tensor:
    """Maps (N, *size) of shares, of weighted channels (N, C, h, w); cut off at 0 unless signed."""
    places = products.sum(dim=1, keepdim=True)
    if not signed:
        places = places.relu()
    maps = F.interpolate(places, size=size, mode="bilinear", align_corners=False)[:, 0]
    amounts = maps.abs()
    # Means, as there are more pixels than places. Written so that a map of NaN stays one.
    terms = products.abs().sum(dim=1).mean(dim=(1, 2))
    empty = amounts.mean(dim=(1, 2)) <= LEAST_EVIDENCE * terms
    return torch.where(empty[:, None, None], 0, maps / amounts.sum(dim=(1, 2), keepdim=True))


# ---- The hooks -----------------------------------------------------------------------------------


class GradCAM:
    """Heatmaps from one layer of a model, or the mean of several layers' heatmaps.

    In a `with` block, or during a single call, the model has one forward hook per layer, is in
    evaluation mode, and its parameters need no gradients. Afterwards, also after an error, all is
    as it was. `logits` holds those of the latest call, (N, classes).

    Args:
        model: maps a float tensor (N, channels, H, W) to logits (N, classes). A compiled one runs
            uncompiled.
        target_layer: a module of `model` or its name, or a sequence of them. Behind the last
            attention of a vision transformer with a class token no gradient reaches the patches:
            take what goes into it, like the last block's first norm.
        method: a key of `METHODS`.
        reshape: turns a layer's output into (N, C, h, w). None is `tokens_to_grid`, and refuses
            attention weights and what has another batch than the images.
        run: which run, from 0, of a target layer that runs several times in one forward pass.

    Raises:
        ValueError: a layer, run, method, class or model that is not there or cannot be explained.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: str | nn.Module | Sequence[str | nn.Module],
        method: str = "gradcam",
        reshape: Callable[[torch.Tensor], torch.Tensor] | None = None,
        run: int | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper calls no hooks either
        layers = dict(model.named_modules(remove_duplicate=False))
        self.target_layers: list[nn.Module] = []
        if isinstance(target_layer, (str, nn.Module)):
            target_layer = [target_layer]
        for layer in target_layer:
            if isinstance(layer, str):
                if not layer or layer not in layers:
                    names = ", ".join(filter(None, layers))
                    raise ValueError(f"the model has no layer {layer!r}; it has {names}")
                layer = layers[layer]
            elif not any(layer is module for module in layers.values()):
                raise ValueError("target_layer is not a part of the model")
            self.target_layers.append(layer)
        if not self.target_layers:
            raise ValueError("target_layer names no layer")
        if method not in METHODS:
            raise ValueError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
        self.model, self.method, self.reshape, self.run = model, METHODS[method], reshape, run
        self.logits: torch.Tensor | None = None
        self._activations: dict[nn.Module, list[torch.Tensor]] = {}  # of every run
        self._hooks: list[Any] = []

    def _keep_activation(
        self, module: nn.Module, inputs: Any, output: torch.Tensor
    ) -> torch.Tensor:
        if module not in self._activations:
            return output  # the caller runs the model, not for a map
        if not isinstance(output, torch.Tensor):
            found = f"the target layer returns {described(output)}, not a tensor"
            raise ValueError(f"{found}: choose another layer")
        # Autograd's graph begins here, with the first layer's activation; later layers lie on it
        # already. The model goes on with a copy, as its next operation may be in place.
        activation = output.clone().requires_grad_()
        self._activations[module].append(activation)
        return activation.clone()

    def __enter__(self) -> "GradCAM":
        if self._hooks:
            raise RuntimeError("this GradCAM is already in use")
        parts = [(module, "training") for module in self.model.modules()]
        parts += [(weight, "requires_grad") for weight in self.model.parameters()]
        self._switched_off = [(part, flag) for part, flag in parts if getattr(part, flag)]
        for part, flag in self._switched_off:
            setattr(part, flag, False)
        layers = set(self.target_layers)
        self._hooks = [layer.register_forward_hook(self._keep_activation) for layer in layers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._activations = [], {}
        for part, flag in self._switched_off:
            setattr(part, flag, True)

    def __call__(
        self,
        images: torch.Tensor,
        target_class: Classes = None,
        versus: Classes = None,
        normalize: bool = True,
    ) -> torch.Tensor:
        """Heatmaps of a batch: one forward pass, one backward pass as far as the first layer.

        With `versus`, y is the difference of two classes' logits, and the map is signed:
        sum_k w_k A_k, where w is the method's weight for y minus that for -y. Finer-CAM (Zhang et
        al. 2025, arXiv 2501.11309) is similar, with several classes and positive parts alone.

        Args:
            images: float tensor (N, channels, H, W) as the model takes it.
            target_class: the class to explain; None takes the predicted ones.
            versus: the class that it is compared with; None compares with none.
            normalize: divide each map by its largest amount, unless it is zeros.

        Returns:
            float32 (N, H, W), from 0 to 1; with `versus` from -1 to 1, negative where a place
            supports that class. With `normalize=False` shares of the evidence: the mean of the
            layers' maps, whose amounts add up to 1, without layers that have no evidence. A map
            without any evidence is zeros.
        """
        if not self._hooks:
            with self:
                return self(images, target_class, versus, normalize)
        if not isinstance(images, torch.Tensor) or images.ndim != 4:
            found = described(images)
            raise ValueError(f"give the images as one tensor (N, channels, H, W), not {found}")
        try:
            activations, gradients = self._backward(images, target_class, versus)
        finally:
            self._activations = {}  # until the next call, the caller may run the model
        shares = []
        for layer, *outputs in zip(self.target_layers, activations, gradients, strict=True):
            activation, gradient = (self._grid(layer, x.detach(), images) for x in outputs)
            weight = self.method(activation, gradient)
            if versus is not None:
                weight = weight - self.method(activation, -gradient)
            products = weight * activation
            shares.append(shares_of_evidence(products, images.shape[2:], versus is not None))
        shares = torch.stack(shares)  # (layers, N, H, W)
        count = shares.any(dim=(2, 3)).sum(dim=0).clamp_min(1)
        maps = shares.sum(dim=0) / count[:, None, None]
        if normalize:
            peak = maps.abs().amax(dim=(1, 2), keepdim=True)
            maps = maps / peak.clamp_min(torch.finfo(maps.dtype).tiny)
        return maps

    def _backward(
        self, images: torch.Tensor, target_class: Classes, versus: Classes
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """The activation of each target layer, and the score's gradient with respect to it."""
        self._activations = {layer: [] for layer in self.target_layers}
        with torch.inference_mode(False), torch.enable_grad():
            # Autograd takes no tensor that was made in inference mode, but takes a copy of it.
            logits = self.model(images.clone() if images.is_inference() else images.detach())
            if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
                raise ValueError(
                    f"the model returns {described(logits)}, not logits (N, classes): wrap it in a "
                    "module that does"
                )
            activations = self._chosen_runs()
            self.logits = logits.detach()
            target = self.logits.argmax(dim=1)
            if target_class is not None:
                target = self._classes("target_class", target_class)
            score = logits.gather(1, target[:, None])
            if versus is not None:
                score = score - logits.gather(1, self._classes("versus", versus)[:, None])
            gradients = (None,)
            if score.requires_grad:
                if self.reshape is None:
                    for activation in activations:
                        check_output(activation, score, len(images))
                # An image's score depends on its own activations alone, so the gradient of the sum
                # holds every image's.
                gradients = torch.autograd.grad(score.sum(), activations, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                "no gradient reaches the target layer: the logits do not depend on it, or no_grad "
                "or detach cuts it off"
            )
        return activations, gradients

    def _chosen_runs(self) -> list[torch.Tensor]:
        """The activation of each target layer."""
        runs = [self._activations[layer] for layer in self.target_layers]
        if not all(runs):
            raise ValueError(
                "the model's forward pass does not go through the target layer: choose another one"
            )
        count = min((len(outputs) for outputs in runs if len(outputs) > 1), default=1)
        run = 0 if self.run is None and count == 1 else self.run
        if run not in range(count):
            raise ValueError(
                f"the target layer's number of runs in one forward pass is {count}: "
                f"give GradCAM the one to explain as `run`, from 0 to {count - 1}"
            )
        return [outputs[min(run, len(outputs) - 1)] for outputs in runs]

    def _grid(self, layer: nn.Module, output: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """A layer's output, or its gradient, as float32 (N, C, h, w)."""
        if self.reshape is None:
            return tokens_to_grid(output, images.shape[2:], channel_dimensions(layer)).float()
        grid = self.reshape(output)
        if not isinstance(grid, torch.Tensor) or grid.ndim != 4 or len(grid) != len(images):
            found = f"`reshape` returns {described(grid)}, not a tensor (N, C, h, w)"
            raise ValueError(f"{found} for the {len(images)} images; {TOKENS_RESHAPE}")
        return grid.float()

    def _classes(self, name: str, given: Classes) -> torch.Tensor:
        """One class index per image, int64 of shape (N,)."""
        n, classes = self.logits.shape
        chosen = torch.as_tensor(given, device=self.logits.device)
        if chosen.is_floating_point() or chosen.shape not in ((), (n,)):
            raise ValueError(f"{name}: give one class index, or one for each of the {n} images")
        if n and not (0 <= int(chosen.min()) and int(chosen.max()) < classes):
            raise ValueError(f"{name}: give class indices from 0 to {classes - 1}")
        # Autograd saves it, which it refuses for a tensor of inference mode.
        return chosen.long().expand(n).clone()
