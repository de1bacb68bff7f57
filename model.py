"""A small CNN + Transformer hybrid for 28x28 grey images, and the checkpoint format it is saved in.

A convolutional stem looks at pixels and strokes and turns the image into a 7x7 grid of tokens; a
Transformer encoder relates the 49 tokens to each other; a pooled head turns them into 10 logits:

    image (N, 1, 28, 28) -> stem (N, embed_dim, 7, 7) -> tokens (N, 49, embed_dim) -> blocks -> pool
    -> logits (N, 10)
"""

import io
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import StochasticDepth

from common.files import UserError, whole_file
from dataset import CLASS_NAMES, IMAGE_SIZE

MAX_PARAMETERS = 600_000
SHIPPED_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "shipped" / "model.pt"
STEM_STRIDE = 4  # two stride-2 convolutions: 28 -> 14 -> 7
GRID_SIZE = IMAGE_SIZE // STEM_STRIDE
# PyTorch's CPU kernel is made for long sequences; 49 tokens are faster without it.
FUSED_ATTENTION = False


# ---- Configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; an impossible combination raises a `UserError`."""

    stem_dims: tuple[int, int]  # channels of the stem at 28x28 and at 14x14
    stem_blocks: tuple[int, int, int]  # residual blocks of the stem at 28x28, at 14x14 and at 7x7
    embed_dim: int  # channels of the stem at 7x7, which is the width of a token
    depth: int  # number of Transformer blocks; 0 leaves a purely convolutional network
    num_heads: int  # attention heads per block; divides embed_dim
    mlp_ratio: float  # hidden width of a block's MLP, as a multiple of embed_dim
    pool: str  # "attention" (a learned weighted mean of the tokens) or "mean"
    # Stochastic depth of the last block, 0 to 1 (excluded); earlier blocks get less, linearly
    drop_path: float
    residual_unit: str  # "resnet" or "pyramidnet", see ResidualBlock

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}: "
                "change one of them"
            )
        if len(self.stem_dims) != 2 or len(self.stem_blocks) != 3:
            raise UserError(
                f"stem_dims {self.stem_dims}, stem_blocks {self.stem_blocks}: give 2 and 3 numbers"
            )


# ---- The parts -----------------------------------------------------------------------------------


def conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution and its batch norm (Ioffe & Szegedy 2015)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: (N, C, H, W) -> (N, C, H, W).

    In He et al. 2015 ("resnet") a ReLU follows the sum; in Han et al. 2017 (arXiv 1610.02915,
    "pyramidnet") none does, and a batch norm comes first.
    """

    def __init__(self, channels: int, unit: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if unit == "pyramidnet" else nn.Identity()
        self.conv1 = conv_bn(channels, channels)
        self.conv2 = conv_bn(channels, channels)
        self.last = nn.Identity() if unit == "pyramidnet" else nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.conv2(F.relu(self.conv1(self.norm(x))))
        return self.last(x + branch)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) over the tokens: (N, T, C) -> (N, T, C)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = (
            self.qkv(x).view(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        )
        if x.device.type == "cpu" and not FUSED_ATTENTION:
            x = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v  # (N, heads, T, C / heads)
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, t, c))


class EncoderBlock(nn.Module):
    """A pre-norm Transformer block (Xiong et al. 2020): (N, T, C) -> (N, T, C)."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        hidden_dim = max(1, int(embed_dim * mlp_ratio))
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, embed_dim)
        )
        # It drops a branch for some images (after Huang et al. 2016).
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Pool(nn.Module):
    """A mean of tokens, (N, T, C) -> (N, C), plain or weighted by scores (Hassani et al. 2021)."""

    def __init__(self, embed_dim: int, pool: str) -> None:
        super().__init__()
        self.score = nn.Linear(embed_dim, 1) if pool == "attention" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.score is None:
            return x.mean(dim=1)
        weights = self.score(x).softmax(dim=1)  # (N, T, 1)
        return (weights.transpose(1, 2) @ x).squeeze(1)


# ---- The model -----------------------------------------------------------------------------------


class HybridClassifier(nn.Module):
    """CNN stem + Transformer encoder + pooled head.

    `forward` takes normalised images, a float tensor of shape (N, 1, 28, 28) as `dataset.normalize`
    makes it, and returns logits of shape (N, 10); `softmax(dim=1)` turns them into probabilities.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Sequential()
        in_channels = 1
        # A few narrow blocks work at full resolution before the downsampling: few parameters, fine
        # texture.
        for stage, channels in enumerate((*config.stem_dims, config.embed_dim)):
            down = nn.Sequential(
                conv_bn(in_channels, channels, stride=2 if stage else 1), nn.ReLU()
            )
            self.stem.add_module(f"down{stage}" if stage else "first", down)
            for i in range(config.stem_blocks[stage]):
                self.stem.add_module(
                    f"stage{stage}_{i}", ResidualBlock(channels, config.residual_unit)
                )
            in_channels = channels
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID_SIZE * GRID_SIZE, config.embed_dim))
        drop_paths = [config.drop_path * (i + 1) / config.depth for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            EncoderBlock(config.embed_dim, config.num_heads, config.mlp_ratio, drop_path)
            for drop_path in drop_paths
        )
        self.norm = nn.LayerNorm(config.embed_dim)
        self.pool = Pool(config.embed_dim, config.pool)
        self.head = nn.Linear(config.embed_dim, len(CLASS_NAMES))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: He et al. 2015 for convolutions, else a deviation of 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def num_parameters(self) -> int:
        """The number of values in all parameters, frozen ones included."""
        return sum(p.numel() for p in self.parameters())

    def stage_ends(self) -> list[str]:
        """Names of the stem's last layers at 28x28, at 14x14 and at 7x7."""
        names = list(dict(self.stem.named_children()))
        return [
            f"stem.{names[sum(self.config.stem_blocks[: stage + 1]) + stage]}" for stage in range(3)
        ]

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """What the head sees of normalised images (N, 1, 28, 28): the pooled tokens, (N, C)."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (N, C, 7, 7)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed  # (N, 49, C)
        for block in self.blocks:
            x = block(x)
        return self.pool(self.norm(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


# ---- Checkpoints: a zip archive of torch.save with one dictionary of plain values and tensors ----

# What `save_checkpoint` may be given besides the weights.
CONTENTS = dict(train_config=dict, history=list, epoch=int)
# Numbers of a history that are read again.
COLUMNS = ("epoch", "lr", "seconds", "train_accuracy", "val_accuracy")
# The number changes when older files can no longer be read.
CHECKPOINT_FORMAT = "fashion-mnist-hybrid 4"


# What a configuration or weights that do not fit raise.
BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class CheckpointError(UserError):
    """A checkpoint cannot be used."""


def save_checkpoint(path: str | Path, model: HybridClassifier, **contents: Any) -> None:
    """Write a model's configuration and weights, and what else is given, for `load_checkpoint`.

    The contents may be numbers, strings, tensors, and lists and dictionaries of them. A UserError
    if the file cannot be written; an older one is as it was.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    checkpoint = dict(
        format=CHECKPOINT_FORMAT, model_config=asdict(model.config), model=weights, **contents
    )
    # `torch.save` turns a file's own error, such as a full disk, into another one
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[HybridClassifier, dict[str, Any]]:
    """Read a checkpoint of this project: checksums are compared, no code in it is executed.

    Returns:
        The model in evaluation mode on `device`, and the checkpoint's whole dictionary with its
        tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, not of this project, or of another model than
            the present code's.
    """
    path = Path(os.path.expanduser(path))
    try:
        with zipfile.ZipFile(path) as archive:
            # `torch.load` compares no checksums: a flipped bit would be another weight
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} has changed since it was written")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"cannot read {path}: {reason}; name a checkpoint that train.py wrote"
        ) from error
    except Exception as error:  # a damaged or foreign file raises one of a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({reason[:200]}): name another one"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of this version of the project: name one that train.py wrote"
        )
    for name, kind in CONTENTS.items():
        if not isinstance(checkpoint.get(name, kind()), kind):
            raise CheckpointError(
                f"{path} is damaged ({name} is no {kind.__name__}): name another one"
            )
    for row in checkpoint.get("history", ()):
        is_row = isinstance(row, dict) and "epoch" in row
        numbers = [row[name] for name in COLUMNS if name in row] if is_row else [None]
        if not all(isinstance(number, int | float) for number in numbers):
            raise CheckpointError(f"{path} is damaged (history has a wrong row): name another one")
    try:
        model = HybridClassifier(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    except BROKEN as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(
            f"{path} does not fit the model that model.py builds now ({reason}): train again"
        ) from error
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint
