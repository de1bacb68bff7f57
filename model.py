"""A small CNN + Transformer hybrid for 28x28 grey images, and the checkpoint format it is saved in.

A convolutional stem looks at pixels and strokes and turns the image into a 7x7 grid of tokens; a Transformer encoder
relates the 49 tokens to each other; a pooled head turns them into 10 logits:

    image (N, 1, 28, 28) -> stem (N, embed_dim, 7, 7) -> tokens (N, 49, embed_dim) -> blocks -> pool -> logits (N, 10)

Read it from top to bottom: the configuration, the parts, the model, the checkpoints.
"""

import io
import os
import pickle
import pickletools
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from dataset import CLASS_NAMES, IMAGE_SIZE, whole_file

MAX_PARAMETERS = 600_000
STEM_STRIDE = 4  # two stride-2 convolutions: 28 -> 14 -> 7
GRID_SIZE = IMAGE_SIZE // STEM_STRIDE
FUSED_ATTENTION = False  # PyTorch's CPU kernel is made for long sequences; 49 tokens are faster without it


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model. Impossible values raise a `ValueError` that says what to change.

    Attributes:
        stem_dims: channels of the stem at 28x28 and at 14x14.
        stem_blocks: residual blocks of the stem at 28x28, at 14x14 and at 7x7.
        embed_dim: channels of the stem at 7x7, which is the width of a token.
        depth: number of Transformer blocks; 0 leaves a purely convolutional network.
        num_heads: attention heads per block; divides `embed_dim`.
        mlp_ratio: hidden width of a block's MLP, in units of `embed_dim`.
        pool: "attention" (a learned weighted mean of the tokens) or "mean".
        drop_path: stochastic depth of the last Transformer block, in [0, 1); earlier blocks get less, linearly.
    """

    stem_dims: tuple[int, int]
    stem_blocks: tuple[int, int, int]
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    pool: str
    drop_path: float

    def __post_init__(self) -> None:
        for name, length, low, high in (("stem_dims", 2, 1, 256), ("stem_blocks", 3, 0, 64)):
            values = getattr(self, name)  # a list once it has been in a file
            values = tuple(values) if isinstance(values, tuple | list) else (values,)
            object.__setattr__(self, name, values)
            if len(values) != length or any(type(n) is not int or not low <= n <= high for n in values):
                raise ValueError(f"{name} is {values!r}: give {length} whole numbers from {low} to {high}")
        for name in ("embed_dim", "num_heads", "depth"):
            value, (low, high) = getattr(self, name), (0, 256) if name == "depth" else (1, 1024)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}: make it a whole number from {low} to {high}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} cannot be split into {self.num_heads} heads of the same width: "
                f"make embed_dim a multiple of num_heads"
            )
        if not (isinstance(self.mlp_ratio, (int, float)) and 0 < self.mlp_ratio <= 16):  # NaN fails this too
            raise ValueError(f"mlp_ratio is {self.mlp_ratio!r}: make it larger than 0 and at most 16")
        if self.pool not in ("attention", "mean"):
            raise ValueError(f"pool is {self.pool!r}: choose 'attention' or 'mean'")
        if not (isinstance(self.drop_path, (int, float)) and 0 <= self.drop_path < 1):
            raise ValueError(f"drop_path is {self.drop_path!r}: make it at least 0 and less than 1")


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution and its batch norm (Ioffe & Szegedy 2015): (N, C, H, W) -> (N, C', H / stride, W / stride)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2015): (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(channels, channels)
        self.conv2 = conv_bn(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) over the tokens: (N, T, C) -> (N, T, C)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu" and not FUSED_ATTENTION:
            x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v  # (N, heads, T, C / heads)
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, t, c))


class EncoderBlock(nn.Module):
    """A pre-norm Transformer block (Xiong et al. 2020) with stochastic depth: (N, T, C) -> (N, T, C)."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        hidden_dim = max(1, int(embed_dim * mlp_ratio))
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, embed_dim))
        self.drop_path = drop_path

    def skip(self, branch: torch.Tensor) -> torch.Tensor:
        """Stochastic depth (Huang et al. 2016): in training, drop the whole branch for a random part of the images."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep).div_(keep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.skip(self.attention(self.norm1(x)))
        return x + self.skip(self.mlp(self.norm2(x)))


class Pool(nn.Module):
    """One vector per image, a weighted mean of its tokens: (N, T, C) -> (N, C).

    "attention" learns a score per token and takes the softmax of the scores as weights (the sequence pooling of
    Hassani et al. 2021, arXiv 2104.05704); "mean" weighs all tokens alike.
    """

    def __init__(self, embed_dim: int, pool: str) -> None:
        super().__init__()
        self.score = nn.Linear(embed_dim, 1) if pool == "attention" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.score is None:
            return x.mean(dim=1)
        weights = self.score(x).softmax(dim=1)  # (N, T, 1)
        return (weights.to(x.dtype).transpose(1, 2) @ x).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class HybridClassifier(nn.Module):
    """CNN stem + Transformer encoder + pooled head.

    `forward` takes normalised images, a float tensor of shape (N, 1, 28, 28) as `dataset.normalize` makes it, and
    returns logits of shape (N, 10); `softmax(dim=1)` turns them into probabilities.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Sequential()
        in_channels = 1
        # A few thin blocks see all 28x28 places before anything is thrown away: few parameters, fine texture.
        for stage, channels in enumerate((*config.stem_dims, config.embed_dim)):
            down = nn.Sequential(conv_bn(in_channels, channels, stride=2 if stage else 1), nn.ReLU())
            self.stem.add_module(f"down{stage}" if stage else "first", down)
            for i in range(config.stem_blocks[stage]):
                self.stem.add_module(f"stage{stage}_{i}", ResidualBlock(channels))
            in_channels = channels
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID_SIZE * GRID_SIZE, config.embed_dim))
        self.blocks = nn.ModuleList(
            EncoderBlock(
                config.embed_dim,
                config.num_heads,
                config.mlp_ratio,
                drop_path=config.drop_path * (i + 1) / config.depth,
            )
            for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.embed_dim)
        self.pool = Pool(config.embed_dim, config.pool)
        self.head = nn.Linear(config.embed_dim, len(CLASS_NAMES))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: He et al. 2015 for convolutions, N(0, 0.02) for linear layers and positions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def num_parameters(self) -> int:
        """The number of trainable values."""
        return sum(p.numel() for p in self.parameters())

    def stage_ends(self) -> list[str]:
        """Names of the stem's last layers at 28x28, at 14x14 and at 7x7, for `get_submodule` or `gradcam.GradCAM`."""
        names = list(dict(self.stem.named_children()))
        return [f"stem.{names[sum(self.config.stem_blocks[: stage + 1]) + stage]}" for stage in range(3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (N, C, 7, 7)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed  # (N, 49, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(self.norm(x)))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one dictionary of plain values and tensors. `torch.load(weights_only=True)` reads it without running any
# code of the file's; what it would trust too far is looked at before and after.

CHECKPOINT_FORMAT = "fashion-mnist-hybrid"
CHECKPOINT_VERSION = 2  # 1 had no blocks at 28x28
MAX_CHECKPOINT_BYTES = 256 << 20
MAX_PICKLE_BYTES = 4 << 20  # of all but the tensors; the history of 10,000 epochs takes a third
MAX_PICKLE_TUPLES = 100_000  # four for a tensor; far more, one within the other, exhaust the stack of Python itself
# All that a checkpoint's pickle consists of. What torch.load allows besides can make objects of any size.
PICKLE_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("Float", "Long", "Byte")),
}
PICKLE_OPCODES = set(
    """PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_LIST APPEND APPENDS
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET BINPERSID
    GLOBAL REDUCE BUILD""".split()
)


HISTORY_COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")
HISTORY_OPTIONS = ("test_loss", "test_accuracy")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line that says why and what to do."""


def save_checkpoint(path: str | Path, model: HybridClassifier, **contents: Any) -> None:
    """Write the model's configuration and weights, and whatever else is given, so that `load_checkpoint` reads them.

    At any moment `path` is the old file or the new one, whole.

    Args:
        path: the file; its folder must exist.
        model: on any device; the weights are stored as CPU tensors.
        contents: further entries of the dictionary: numbers, strings, lists, dictionaries, tensors. A `history` is a
            list with a dictionary of numbers for each epoch, named as in HISTORY_COLUMNS.

    Raises:
        OSError: the file cannot be written; an older one is as it was.
    """
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "model_config": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(model.config).items()},
        "model": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        **contents,
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def check_pickle(content: bytes) -> None:
    """Refuse a pickle that could run code, or take much more memory than it has bytes itself.

    Raises:
        pickle.UnpicklingError: it consists of more than what a checkpoint consists of.
        ValueError: it is no pickle, or a far larger one than any checkpoint's.
    """
    names: Counter[str] = Counter()
    # OrderedDict(something) copies what the pickle has to say but once, as often as it likes. So nothing may follow the
    # name, which is kept at some places of the pickle's memory, but the empty arguments and the call.
    places, may_follow = set(), ()
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        names["TUPLE" if name.startswith("TUPLE") else name] += 1
        if name not in PICKLE_OPCODES or (name == "GLOBAL" and argument not in PICKLE_GLOBALS):
            raise pickle.UnpicklingError(f"{name} {argument}")
        if may_follow and name not in may_follow:
            raise pickle.UnpicklingError("OrderedDict with arguments")
        if names["TUPLE"] > MAX_PICKLE_TUPLES or names["REDUCE"] > MAX_PICKLE_TUPLES // 2 or names["BUILD"] > 2:
            raise ValueError("more tuples, calls or states than any checkpoint has")
        if may_follow and name in ("BINPUT", "LONG_BINPUT"):
            places.add(argument)
        elif argument == "collections OrderedDict" or (name.endswith("BINGET") and argument in places):
            may_follow = ("BINPUT", "LONG_BINPUT", "EMPTY_TUPLE")
        else:
            may_follow = ("REDUCE",) if may_follow and name == "EMPTY_TUPLE" else ()


def checked_archive(content: bytes) -> io.BytesIO:
    """Copy an archive of torch.save, entry by entry, if it is what was saved and holds only plain values and tensors.

    torch.load compares no check sums, so that a flipped bit would be a silently different weight, and finds the entries
    in another way than `zipfile`: what it gets is this copy, in which nothing is that was not looked at. A check sum of
    32 bits is against accidents: a stranger can change weights and sum alike.

    Args:
        content: of the file, MAX_CHECKPOINT_BYTES at most.

    Raises:
        pickle.UnpicklingError: see `check_pickle`.
        zipfile.BadZipFile, ValueError and others: it is damaged, or was not written by torch.save.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(copy, "w") as checked:
        entries = archive.infolist()
        if len({entry.filename.lower() for entry in entries}) < len(entries):  # torch tells no upper from lower case
            raise zipfile.BadZipFile("two entries of one name")
        is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if is_packed or sum(entry.file_size for entry in entries) > len(content):
            raise zipfile.BadZipFile("it would grow when it is unpacked")
        for entry in entries:
            part = archive.read(entry)  # compares the check sum
            if entry.filename.lower().endswith(".pkl"):
                if len(part) > MAX_PICKLE_BYTES:
                    raise zipfile.BadZipFile("too much besides tensors")
                check_pickle(part)
            checked.writestr(entry.filename, part)
    copy.seek(0)
    return copy


def check_contents(checkpoint: dict[str, Any], size: int) -> ModelConfig:
    """Refuse a checkpoint whose entries are not what the rest of the project relies on.

    Args:
        checkpoint: what `torch.load` returned.
        size: of the file, in bytes.

    Returns:
        The model's configuration, which the weights fit.

    Raises:
        CheckpointError: the message is the part of the line that follows the file's name.
    """
    version = checkpoint.get("version")
    if type(version) is not int or version != CHECKPOINT_VERSION:
        version = version if type(version) is int else "unknown"
        raise CheckpointError(
            f"has format version {version}, this code reads {CHECKPOINT_VERSION}: train again, or use the code that "
            f"wrote it"
        )
    saved, weights = checkpoint.get("model_config"), checkpoint.get("model")
    names = {field.name for field in fields(ModelConfig)}
    if type(saved) is not dict or saved.keys() != names or type(weights) is not dict:
        raise CheckpointError("lacks its model's configuration or weights: it is damaged, use another one")
    history, columns = checkpoint.get("history", []), set(HISTORY_COLUMNS)
    is_history = type(history) is list and all(
        type(row) is dict
        and columns <= row.keys() <= columns | set(HISTORY_OPTIONS)
        and row["epoch"] == number
        and all(type(x) in (int, float) and (x != x or abs(x) < 1e30) for x in row.values())
        for number, row in enumerate(history, start=1)
    )
    is_run = type(checkpoint.get("epoch", 0)) is int and type(checkpoint.get("train_config", {})) is dict
    if not is_history or not is_run:
        raise CheckpointError("holds a history or settings of no run of this project: it is damaged, use another one")
    try:
        for value in saved.values():
            if any(type(x) not in (int, float, str) for x in (value if type(value) is list else [value])):
                raise ValueError("it holds more than numbers and words")
        config = ModelConfig(**saved)
        with torch.device("meta"):  # no memory is taken before the shapes are known to fit
            expected = {n: (t.shape, t.dtype, t.layout) for n, t in HybridClassifier(config).state_dict().items()}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"has an impossible model configuration ({str(error)[:300]}): use another one") from error
    found = {n: (t.shape, t.dtype, t.layout) for n, t in weights.items() if isinstance(t, torch.Tensor)}
    if found != expected or len(found) < len(weights):
        odd = next((repr(name) for name in expected if found.get(name) != expected[name]), "a weight of no layer")
        raise CheckpointError(f"does not fit its own configuration, first at {odd}: it is damaged, use another one")
    if sum(tensor.nbytes for tensor in weights.values()) > size:  # one number may stand for many
        raise CheckpointError("claims more weights than it holds: name a checkpoint that train.py wrote")
    bad = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise CheckpointError(f"holds values in {bad!r} that are not finite: train again or use another one")
    return config


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[HybridClassifier, dict[str, Any]]:
    """Read a checkpoint of this project.

    Args:
        path: a file that `train.py` wrote.
        device: where the model goes.

    Returns:
        The model in evaluation mode, and the checkpoint's whole dictionary with its tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, not of this project, or does not fit its own configuration.
            Nothing in it is ever executed. Reading it takes three times its size in memory, and 0.5 GB at most for
            what is no tensor.
    """
    path = Path(path)
    if not os.path.isfile(path):  # a name that cannot be is no file either
        raise CheckpointError(f"{path} is not a file: name a checkpoint that train.py wrote (checkpoints/…/*.pt)")
    if path.stat().st_size > MAX_CHECKPOINT_BYTES:
        raise CheckpointError(f"{path} is larger than any checkpoint of this project: name one that train.py wrote")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; mend that, or name another one") from error
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(checked_archive(content), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects that could run code, so it was not opened: name a checkpoint that train.py wrote"
        ) from error
    except Exception as error:  # a damaged archive ends in one of a dozen types, none of them more telling than this
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged or no checkpoint, name another one"
        ) from error
    if type(checkpoint) is not dict or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this project: name one that train.py wrote")
    try:
        model = HybridClassifier(check_contents(checkpoint, len(content)))
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    model.load_state_dict(checkpoint["model"])
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint
