"""The optimiser: Muon and AdamW, their learning rate, the moving average of the weights; a whitened
first layer.
"""

import math
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.files import UserError

# Layers next to the input or the output, which AdamW suits better than Muon.
FIRST_AND_LAST = ("stem.first.", "pool.score.", "head.")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024, kellerjordan.github.io).

    Convolution filters count as matrices of shape (out, in * height * width). The update is scaled
    as Liu et al. 2025 (arXiv 2502.16982) propose, to the size of AdamW's, so that both take the
    same learning rate and weight decay. Unlike `torch.optim.Muon`, it takes filters and computes in
    float32: many CPUs only emulate bfloat16.
    """

    def __init__(
        self,
        params: list[torch.Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        steps: int = 5,
    ) -> None:
        self.steps = steps
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum, same_size = group["lr"], group["momentum"], {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(state["momentum"], momentum).flatten(1).float()
                same_size.setdefault(min(update.shape), []).append((p, update))
            for pairs in same_size.values():
                for (p, _), update in zip(
                    pairs, orthogonalize([update for _, update in pairs], self.steps), strict=True
                ):
                    scale = 0.2 * max(update.shape) ** 0.5
                    p.mul_(1 - lr * group["weight_decay"])
                    p.sub_(update.view_as(p) * (lr * scale))


# Those of three steps bring singular values from 0.02 to 1 to 0.95 to 1.11.
THREE = [(7.2939, -20.9967, 15.4426), (3.2712, -2.7957, 0.6547), (2.5266, -2.1254, 0.6162)]
COEFFICIENTS = {5: [(3.4445, -4.7750, 2.0315)] * 5, 3: THREE}


def orthogonalize(matrices: list[torch.Tensor], steps: int = 5) -> list[torch.Tensor]:
    """Bring each matrix's singular values close to 1, by Newton-Schulz (Jordan et al. 2024).

    A step multiplies the matrix by a polynomial of its Gram matrix. The polynomials commute, so
    they are multiplied with each other first, in the smaller dimension, and with the matrix once.
    Takes and returns float32 matrices whose smaller dimension is the same: many small operations
    would take longer. After five steps the singular values lie between 0.7 and 1.2, those near 0
    stay lower.
    """
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    wide = [x / (x.norm() + 1e-7) for x in wide]
    gram = torch.stack([x @ x.mT for x in wide])
    identity = torch.eye(len(gram[0]), device=gram.device)
    product = identity.expand_as(gram)
    for a, b, c in COEFFICIENTS[steps]:
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c).add_(a * identity)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    pairs = zip(product, wide, matrices, strict=True)
    return [(p @ x).mT if matrix.shape[0] > matrix.shape[1] else p @ x for p, x, matrix in pairs]


@torch.no_grad()
def whiten_first_layer(model: nn.Module, x: torch.Tensor) -> None:
    """Make the first filters the principal components of 3x3 patches, and freeze that layer.

    Batch norm then gives all components the same variance, which whitens the patches. Jordan 2024
    (arXiv 2404.00498) takes 2x2 patches, and scales the filters instead. Both signs are needed, as
    ReLU keeps only positive values; if the number of filters is odd, the last component has one.
    Takes normalised images, float32 (N, 1, 28, 28). The components of largest variance come first.
    There are nine, so more than 18 filters raise a `UserError`.
    """
    patches = F.unfold(x.cpu(), kernel_size=3).transpose(0, 1).flatten(1)  # (9, N * 26 * 26)
    # In rows; eigh is ascending.
    components = torch.linalg.eigh(patches.cov()).eigenvectors.T.flip(0)
    filters = torch.stack([components, -components], dim=1).view(-1, 1, 3, 3)
    weight = model.stem.first.requires_grad_(False)[0][0].weight
    if len(weight) > len(filters):
        raise UserError(
            f"--whiten makes only {len(filters)} filters: lower the first --stem-dims, "
            "or add --no-whiten"
        )
    weight.copy_(filters[: len(weight)])


def make_optimizers(
    model: nn.Module,
    kind: str,
    weight_decay: float,
    momentum: float = 0.95,
    bias_lr: float = 1.0,
    muon_steps: int = 5,
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices and filters, AdamW (Loshchilov & Hutter 2019) for the rest.

    Only the weights of linear layers and filters decay; norms, biases and positions do not. With
    kind "adamw", AdamW takes the hidden ones, too. The learning rate is set at each step, by
    `take_step`.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    weights = {id(layer.weight) for layer in layers.values()}
    matrices = [p for p in model.parameters() if id(p) in weights]
    biases = [m.bias for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    known = {id(p) for p in biases}
    others = [p for p in model.parameters() if id(p) not in weights and id(p) not in known]
    groups = [
        dict(params=matrices, weight_decay=weight_decay),
        dict(params=others, weight_decay=0.0),
        dict(params=biases, weight_decay=0.0, lr_scale=bias_lr),
    ]
    # An optimiser of your own: return [torch.optim.SGD(groups, lr=0.0, momentum=0.9)]
    if kind == "adamw":
        return [adamw(groups)]
    first_and_last = {
        id(layer.weight) for name, layer in layers.items() if f"{name}.".startswith(FIRST_AND_LAST)
    }
    hidden = [p for p in matrices if id(p) not in first_and_last]
    rest = [p for p in matrices if id(p) in first_and_last]
    optimizers = [adamw([dict(groups[0], params=rest), *groups[1:]])]
    if hidden:
        optimizers.append(
            Muon(hidden, lr=0.0, weight_decay=weight_decay, momentum=momentum, steps=muon_steps)
        )
    return optimizers


def adamw(groups: list[dict]) -> torch.optim.AdamW:
    """AdamW for these groups of parameters, in one kernel for all where the device has it."""
    device = groups[-1]["params"][0].device.type
    # A CUDA graph can be made of a capturable one.
    options = dict(fused=device != "mps", capturable=device == "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), **options)


def check_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Refuse a trainable parameter that no optimiser has, or more than one, by its name."""
    held = Counter(
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    )
    for name, parameter in model.named_parameters():
        number = held[id(parameter)]
        if parameter.requires_grad and number != 1:
            raise UserError(
                f"make_optimizers in training/optim.py gives {name} to {number} optimizers: "
                "give each trainable parameter to exactly one"
            )


def learning_rate(
    step: int, total_steps: int, warmup_steps: int, peak: float, schedule: str
) -> float:
    """Linear warm-up to `peak`, then half a cosine or a straight line down to 0.

    The cosine is Loshchilov & Hutter's (2017), the line as in Bergsma et al. 2025 (arXiv
    2502.15938).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def start_up_decay(step: int) -> float:
    """The largest decay of the average at a step: its window is a ninth of the steps so far.

    So the random initial weights are soon forgotten.
    """
    return (1 + step) / (10 + step)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float | torch.Tensor) -> None:
    """Move the averaged weights, and batch norm's statistics, a little towards the current ones."""
    parameters, averaged, current = dict(ema.named_parameters()), [], []
    for (name, a), c in zip(ema.state_dict().items(), model.state_dict().values(), strict=True):
        if a.dtype == torch.float32 and (name in parameters or "running_" in name):
            averaged.append(a)
            current.append(c)
        else:  # other buffers, and bfloat16 numbers, which steps this small would not change
            a.copy_(c)
    torch._foreach_mul_(averaged, decay)
    torch._foreach_add_(averaged, torch._foreach_mul(current, 1 - decay))


def take_step(
    model: nn.Module,
    ema: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    lr: float | torch.Tensor,
    decay: float | torch.Tensor,
    grad_clip: float,
) -> None:
    """Clip the gradients, take a step, clear them, and update the average."""
    if grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
    model.zero_grad()
    update_ema(ema, model, decay)
