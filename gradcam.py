"""Grad-CAM and related methods: which places of an image support a class, seen from some layer.

    with GradCAM(model, "blocks.0") as cam:
        maps = cam(dataset.normalize(images))  # float32 (N, 28, 28), 0 to 1

One forward pass keeps the layer's activations A (channels k, a small grid of places), one backward
pass the gradients of the class score y, G = dy / dA. A method turns both into weights w, and the
map is relu(sum_k w_k A_k): evidence against the class is cut off.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A map's sum, as a share of its terms' sizes; less is no evidence. Rounding leaves 3e-6 of HiResCAM
# in front of a layer norm; the faintest of 1,000 LayerCAM maps of the record has 8e-5.
LEAST_EVIDENCE = 1e-5
ADVICE = (
    "choose another layer, or give `reshape`: lambda t: t for (N, C, h, w), t.permute(0, 3, 1, 2) "
    "for (N, h, w, C), t[:, extra:].mT.unflatten(2, (h, w)) behind `extra` class or register "
    "tokens, with t.transpose(0, 1) first if the batch is second"
)
Classes = int | Sequence[int] | Tensor | None  # one for all images, or one for each


# The methods turn activations and gradients, both (N, C, h, w), into weights.


def gradcam(activation: Tensor, gradient: Tensor) -> Tensor:
    """A channel's mean gradient, (N, C, 1, 1) (Selvaraju et al. 2017, arXiv 1610.02391)."""
    return gradient.mean(dim=(2, 3), keepdim=True)


def gradcam_plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    """A channel's positive gradients, weighted by curvature, (N, C, 1, 1).

    Chattopadhay et al. 2018, arXiv 1710.11063: of exp(y), so higher derivatives are powers of G.
    """
    curvature = 2 * gradient**2 + activation.sum(dim=(2, 3), keepdim=True) * gradient**3
    share = gradient**2 / torch.where(curvature == 0, 1, curvature)
    return (share * gradient.relu()).sum(dim=(2, 3), keepdim=True)


def hirescam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Each place's own gradient (Draelos & Carin 2020, arXiv 2011.08891)."""
    return gradient


def layercam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Each place's own positive gradient (Jiang et al. 2021, IEEE TIP 30).

    They join layers by the maximum, not the mean.
    """
    return gradient.relu()


METHODS = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "layercam": layercam,
}


def shares_of_evidence(products: Tensor, size: Sequence[int], signed: bool) -> Tensor:
    """Maps (N, *size) of shares, of weighted channels (N, C, h, w); cut off at 0 unless signed."""
    places = products.sum(dim=1, keepdim=True)
    if not signed:
        places = places.relu()
    maps = F.interpolate(places, size=size, mode="bilinear", align_corners=False)[:, 0]
    amounts = maps.abs()
    # Means, as there are more pixels than places. NaN fails `<=`: a map of NaN stays one.
    terms = products.abs().sum(dim=1).mean(dim=(1, 2))
    empty = amounts.mean(dim=(1, 2)) <= LEAST_EVIDENCE * terms
    return torch.where(empty[:, None, None], 0, maps / amounts.sum(dim=(1, 2), keepdim=True))


def tokens_to_grid(
    activation: Tensor, image_size: Sequence[int], channels: Sequence[int] = (1, 3)
) -> Tensor:
    """Bring a layer's output to (N, C, h, w), in the proportions of `image_size`, (H, W).

    Takes tokens (N, h * w, C), row by row, and 4-D outputs with C in a dimension of `channels`. A
    ValueError if it fits in no way or in two, or is attention weights. A shape does not tell all:
    16 patches and 9 registers look like 25 patches, and queries (N, heads, T, d) like a grid.
    """
    height, width = image_size
    grids = []
    slack = 1
    if activation.ndim == 4:
        grids = [activation.movedim(dimension, 1) for dimension in channels]
        if height != width:
            slack = 2 * max(height, width)  # two places, as strides round
    elif activation.ndim == 3:
        tokens = activation.shape[1]
        h = round((tokens * height / width) ** 0.5) or 1
        if tokens > 1 and tokens % h == 0:  # a single token is a class token, or a mean
            grids = [activation.mT.unflatten(2, (h, -1))]
    grids = [grid for grid in grids if abs(grid.shape[2] * width - grid.shape[3] * height) < slack]
    if grids and (activation.sum(dim=-1) - 1).abs().mean() < 0.01:
        grids = []  # attention weights: each row adds up to 1
    if len(grids) != 1:
        found = f"the layer's output {tuple(activation.shape)} fits the {height}x{width} image"
        raise ValueError(f"{found} in {len(grids)} ways: {ADVICE}")
    return grids[0]


class GradCAM:
    """Heatmaps from one layer of a model, or the mean of several layers'.

    In one `with` block or call, the model is frozen and in evaluation mode; afterwards it is as
    before. `logits`, (N, classes), are the latest call's.

    Args:
        model: maps images to logits (N, classes); a compiled one runs uncompiled.
        target_layer: a module of `model` or its name, or several. Behind a vision transformer's
            last attention, no gradient of a class token reaches the patches: take what goes into
            it, like the last block's first norm.
        method: a key of `METHODS`.
        reshape: turns a layer's output into (N, C, h, w); None is `tokens_to_grid`.
        run: which one, from 0, of a layer's several runs in a forward pass.
        log_odds: y is log(p / (1 - p)), not the logit: what raises all classes is no evidence.

    A ValueError if what is given is not there, or cannot be explained.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: str | nn.Module | Sequence[str | nn.Module],
        method: str = "gradcam",
        reshape: Callable[[Tensor], Tensor] | None = None,
        run: int | None = None,
        log_odds: bool = False,
    ) -> None:
        self.model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper calls no hooks
        layers = dict(self.model.named_modules(remove_duplicate=False))
        del layers[""]  # the model itself
        if isinstance(target_layer, (str, nn.Module)):
            target_layer = [target_layer]
        self.target_layers = [layers.get(layer, layer) for layer in target_layer]
        for layer in self.target_layers:
            if layer not in layers.values():
                raise ValueError(f"the model has no layer {layer!r}; it has {', '.join(layers)}")
        if method not in METHODS:
            raise ValueError(f"{method!r} is none of the methods {', '.join(METHODS)}")
        self.method = METHODS[method]
        self.reshape = reshape
        self.run = run
        self.log_odds = log_odds
        self.logits = None
        self._is_open = False

    def __enter__(self) -> "GradCAM":
        self._training = [module for module in self.model.modules() if module.training]
        self._trainable = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._switch(False)
        return self

    def __exit__(self, *error: object) -> None:
        self._switch(True)

    def _switch(self, on: bool) -> None:
        self._is_open = not on
        for module in self._training:
            module.training = on
        for weight in self._trainable:
            weight.requires_grad = on

    @torch.inference_mode(False)  # switches gradients on, also under no_grad
    def __call__(
        self,
        images: Tensor,
        target_class: Classes = None,
        versus: Classes = None,
        normalize: bool = True,
    ) -> Tensor:
        """Heatmaps of a batch: one forward pass, one backward pass as far as the first layer.

        With `versus`, y is the difference of two logits, w the method's weight for y minus that
        for -y, and the map sum_k w_k A_k is signed (as Finer-CAM, Zhang et al. 2025, arXiv
        2501.11309).

        Args:
            images: floats (N, channels, H, W), as the model takes them.
            target_class: the class to explain; None takes the predicted ones.
            versus: the class to compare it with.
            normalize: divide each map by its largest amount; else a layer's amounts add up to 1.

        Returns:
            float32 (N, H, W), from 0 to 1; with `versus` from -1 to 1, negative for that class.
            Layers without evidence are left out of the mean; a map without any is zeros.
        """
        if not self._is_open:
            with self:
                return self(images, target_class, versus, normalize)
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError("give the images as one tensor (N, channels, H, W)")
        runs = {layer: [] for layer in self.target_layers}

        def keep(layer: nn.Module, inputs: tuple, output: object) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            # Autograd's graph begins here. The model's next operation may be in place: on a copy.
            activation = output.clone().requires_grad_()
            runs[layer].append(activation)
            return activation.clone()

        with ExitStack() as hooks:
            for layer in runs:
                hooks.enter_context(layer.register_forward_hook(keep))
            logits = self.model(images.clone())  # autograd saves no inference tensor
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError("wrap the model, so that it returns logits (N, classes)")
        activations = [self._chosen(runs[layer]) for layer in self.target_layers]
        self.logits = logits.detach()
        if target_class is None:
            target_class = self.logits.argmax(dim=1)
        target = self._indices("target_class", target_class)
        score = logits.gather(1, target)
        signed = versus is not None
        if signed:
            score = score - logits.gather(1, self._indices("versus", versus))
        elif self.log_odds:
            others = logits.scatter(1, target, -torch.inf)
            score = score - others.logsumexp(dim=1, keepdim=True)
        gradients = [None]
        if score.requires_grad:
            for activation in activations:
                self._check_batch(activation, score)
            # A score depends on its own image alone: the sum's gradient holds every image's.
            gradients = torch.autograd.grad(score.sum(), activations, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise ValueError("the layer has no gradient: unused, or cut off by no_grad or detach")

        shares = []
        for layer, *outputs in zip(self.target_layers, activations, gradients, strict=True):
            activation, gradient = (self._grid(layer, x.detach(), images) for x in outputs)
            weight = self.method(activation, gradient)
            if signed:
                weight = weight - self.method(activation, -gradient)
            shares.append(shares_of_evidence(weight * activation, images.shape[2:], signed))
        shares = torch.stack(shares)  # (layers, N, H, W)
        count = shares.any(dim=(2, 3)).sum(dim=0).clamp_min(1)
        maps = shares.sum(dim=0) / count[:, None, None]
        if normalize:
            maps = maps / maps.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
        return maps

    def _chosen(self, runs: list[Tensor]) -> Tensor:
        run = 0 if len(runs) == 1 else self.run
        if run not in range(len(runs)):
            found = f"the layer returns {len(runs)} tensors in a forward pass"
            raise ValueError(f"{found}: choose another layer, or a `run` from 0")
        return runs[run]

    def _indices(self, name: str, classes: Classes) -> Tensor:
        """A class for each image, int64 (N, 1)."""
        n, count = self.logits.shape
        given = torch.as_tensor(classes, device=self.logits.device)
        indices = given.long() % count
        if given.shape not in ((), (n,)) or (given != indices).any():
            raise ValueError(f"{name}: give a class from 0 to {count - 1}, or {n}, one per image")
        return indices.expand(n)[:, None]

    def _check_batch(self, activation: Tensor, score: Tensor) -> None:
        """Refuse tokens (T, N, C), which look like (N, T, C) where T = N."""
        n = len(score)
        if self.reshape is not None or activation.ndim != 3 or activation.shape[:2] != (n, n):
            return
        options = dict(retain_graph=True, materialize_grads=True)
        (gradient,) = torch.autograd.grad(score[0], activation, **options)
        if gradient[1:].any():  # the first score depends on all rows
            raise ValueError(f"the layer's output has the batch second: {ADVICE}")

    def _grid(self, layer: nn.Module, output: Tensor, images: Tensor) -> Tensor:
        """A layer's output, or its gradient, as float32 (N, C, h, w)."""
        if self.reshape is not None:
            grid = self.reshape(output)
        else:
            is_2d = type(layer).__name__.endswith("2d")  # a convolution, batch norm or pooling
            grid = tokens_to_grid(output, images.shape[2:], [1] if is_2d else [1, 3])
        if not isinstance(grid, Tensor) or grid.ndim != 4 or len(grid) != len(images):
            found = f"the layer's output {tuple(output.shape)} becomes no grid (N, C, h, w)"
            raise ValueError(f"{found} of {len(images)} images: {ADVICE}")
        return grid.float()
