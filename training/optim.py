"""Muon and AdamW, their learning rate, the averaged weights, and a whitened first layer."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import UserError

# Layers that AdamW suits better than Muon.
FIRST_AND_LAST = ("stem.first.", "pool.score.", "head.")
# Of the three steps of Newton-Schulz, fitted so that singular values from 0.02 to 1 end near 1.
POLYNOMIALS = (
    (7.2939, -20.9967, 15.4426),
    (3.2712, -2.7957, 0.6547),
    (2.5266, -2.1254, 0.6162),
)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024).

    Filters count as matrices (out, in * height * width). The update has the size of AdamW's, so
    both take the same learning rate (Liu et al. 2025, arXiv 2502.16982). `torch.optim.Muon` takes
    no filters, and computes in bfloat16, which is slow on many CPUs.
    """

    def __init__(
        self, params: list[Tensor], lr: float, weight_decay: float, momentum: float
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum = group["momentum"]
            same_size = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)  # of the gradients
                state["mean"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(state["mean"], momentum).flatten(1).float()
                same_size[min(update.shape)].append((p, update))
            for pairs in same_size.values():
                parameters, updates = zip(*pairs, strict=True)
                for p, update in zip(parameters, orthogonalize(updates), strict=True):
                    scale = 0.2 * max(update.shape) ** 0.5
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.view_as(p) * (group["lr"] * scale))


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Bring singular values close to 1, by three steps of Newton-Schulz (Jordan et al. 2024).

    Those above 0.02 of the matrix's norm end between 0.88 and 1.15, others lower. A step multiplies
    by a polynomial of the Gram matrix; the polynomials are small, so they are multiplied first.
    Takes matrices of the same smaller dimension.
    """
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    wide = [x / (x.norm() + 1e-7) for x in wide]
    gram = torch.stack([x @ x.mT for x in wide])
    identity = torch.eye(len(gram[0]), device=gram.device)
    product = identity.expand_as(gram)
    for first, third, fifth in POLYNOMIALS:
        polynomial = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        polynomial += first * identity
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    results = [p @ x for p, x in zip(product, wide, strict=True)]
    pairs = zip(results, matrices, strict=True)
    return [result if result.shape == x.shape else result.mT for result, x in pairs]


@torch.no_grad()
def whiten_first_layer(model: nn.Module, x: Tensor) -> None:
    """Make the first filters the principal components of 3x3 patches, and freeze that layer.

    Its batch norm then whitens the patches (after Jordan 2024, arXiv 2404.00498). The nine
    components, of largest variance first, come with both signs, as ReLU keeps only one. Beyond
    these 18, filters stay as they were drawn. Takes normalised images, float32 (N, 1, 28, 28);
    with three channels there are 27 components.
    """
    patches = F.unfold(x.cpu(), kernel_size=3).transpose(0, 1).flatten(1)  # (9 * C, N * 26 * 26)
    components = torch.linalg.eigh(patches.cov()).eigenvectors.T.flip(0)  # eigh is ascending
    filters = torch.stack([components, -components], dim=1).view(-1, x.shape[1], 3, 3)
    weight = model.stem.first.requires_grad_(False)[0][0].weight
    weight[: len(filters)] = filters[: len(weight)]


def make_optimizers(
    model: nn.Module, kind: str, weight_decay: float, momentum: float
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices and filters, AdamW (Loshchilov & Hutter 2019) for the rest, or all.

    Only matrices and filters decay. `take_step` sets the learning rate.
    """
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.ndim in (2, 4)}  # 4: filters
    others = [p for name, p in named.items() if name not in matrices]
    groups = [
        dict(params=list(matrices.values()), weight_decay=weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    optimizers = []
    if kind == "muon":
        outer = [name for name in matrices if name.startswith(FIRST_AND_LAST)]
        groups[0]["params"] = [matrices.pop(name) for name in outer]
        muon = dict(lr=0.0, weight_decay=weight_decay, momentum=momentum)
        optimizers = [Muon(list(matrices.values()), **muon)]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    return [adamw, *optimizers]


def check_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Refuse, by name, a trainable parameter that no or several optimisers have."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = Counter(p for group in groups for p in group["params"])
    for name, p in model.named_parameters():
        if p.requires_grad and held[p] != 1:
            what = f"make_optimizers gives {name} to {held[p]} optimizers"
            raise UserError(f"{what}: give each trainable parameter to one")


def learning_rate(
    step: int, total_steps: int, warmup_steps: int, peak: float, schedule: str
) -> float:
    """Linear warm-up to `peak`, then half a cosine (Loshchilov & Hutter 2017) or a line down to 0
    (Bergsma et al. 2025, arXiv 2502.15938).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights and batch norm's statistics a little towards the current ones."""
    averaged, current = [], []
    for a, c in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if a.dtype == torch.float32:
            averaged.append(a)
            current.append(c)
        else:  # integers; bfloat16, which steps this small would not change
            a.copy_(c)
    torch._foreach_mul_(averaged, decay)
    torch._foreach_add_(averaged, torch._foreach_mul(current, 1 - decay))


def take_step(
    model: nn.Module,
    ema: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    lr: float,
    decay: float,
    grad_clip: float,
) -> None:
    """Clip the gradients (0: no), step, and update the average."""
    if grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    model.zero_grad()
    update_ema(ema, model, decay)
