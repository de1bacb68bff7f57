"""A small CNN + Transformer hybrid for 28x28 grey images, and its checkpoints.

image (N, 1, 28, 28) -> convolutional stem (N, C, 7, 7) -> tokens (N, 49, C)
-> Transformer blocks -> pool (N, C) -> logits (N, 10), where C is the model's `embed_dim`
"""

import io
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
from common.files import UserError, whole_file
from dataset import CHANNELS, FASHION_MNIST, IMAGE_SIZE, DataInfo

SHIPPED_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints/shipped/model.pt"
PHOTOGRAPHS_CHECKPOINT = SHIPPED_CHECKPOINT.with_name("photographs.pt")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; `SETTINGS` in train.py says what each field is."""

    stem_dims: tuple[int, int]
    stem_blocks: tuple[int, int, int]
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    pool: str
    drop_path: float
    residual_unit: str

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            what = f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            raise UserError(f"{what}: change one of them")


def conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution and its batch norm (Ioffe & Szegedy 2015)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: (N, C, H, W) -> (N, C, H, W).

    "resnet" (He et al. 2015) has a ReLU after the sum; "pyramidnet" (Han et al. 2017, arXiv
    1610.02915) has none, but a batch norm first.
    """

    def __init__(self, channels: int, unit: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if unit == "pyramidnet" else nn.Identity()
        self.conv1 = conv_bn(channels, channels)
        self.conv2 = conv_bn(channels, channels)
        self.last = nn.Identity() if unit == "pyramidnet" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(F.relu(self.conv1(self.norm(x))))
        return self.last(x + branch)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017): (N, T, C) -> (N, T, C)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        head_dim = c // self.num_heads
        qkv = self.qkv(x).view(n, t, 3, self.num_heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head_dim)
        if x.is_cuda:
            x = F.scaled_dot_product_attention(q, k, v)
        else:  # that is slower on a CPU with few tokens, and wrong on MPS
            x = ((q * head_dim**-0.5) @ k.mT).softmax(dim=-1) @ v
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
        self.drop_path = nn.Dropout(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.kept(self.attention(self.norm1(x)))
        return x + self.kept(self.mlp(self.norm2(x)))

    def kept(self, branch: Tensor) -> Tensor:
        """A branch, in training without some of the images (after Huang et al. 2016)."""
        return branch * self.drop_path(branch.new_ones(len(branch), 1, 1))


class Pool(nn.Module):
    """The tokens' mean, or one weighted by scores (Hassani et al. 2021): (N, T, C) -> (N, C)."""

    def __init__(self, embed_dim: int, pool: str) -> None:
        super().__init__()
        self.score = nn.Linear(embed_dim, 1) if pool == "attention" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.score is None:
            return x.mean(dim=1)
        weights = self.score(x).softmax(dim=1)  # (N, T, 1)
        return (weights.transpose(1, 2) @ x).squeeze(1)


# ---- The model ----


class HybridClassifier(nn.Module):
    """From images (N, 1, 28, 28), as `dataset.normalize` makes them, to logits (N, 10)."""

    def __init__(self, config: ModelConfig, data: DataInfo = FASHION_MNIST) -> None:
        super().__init__()
        self.config = config
        self.data = data
        self.stem = nn.Sequential()
        in_channels = CHANNELS
        for stage, channels in enumerate((*config.stem_dims, config.embed_dim)):
            name, stride = ("first", 1) if stage == 0 else (f"down{stage}", 2)
            entry = nn.Sequential(conv_bn(in_channels, channels, stride), nn.ReLU())
            self.stem.add_module(name, entry)
            for i in range(config.stem_blocks[stage]):
                block = ResidualBlock(channels, config.residual_unit)
                self.stem.add_module(f"stage{stage}_{i}", block)
            in_channels = channels
        num_tokens = (IMAGE_SIZE // 4) ** 2  # two convolutions with stride 2: 28 -> 14 -> 7
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, config.embed_dim))
        self.blocks = nn.ModuleList()
        for i in range(config.depth):
            drop_path = config.drop_path * (i + 1) / config.depth  # less in earlier blocks
            block = EncoderBlock(config.embed_dim, config.num_heads, config.mlp_ratio, drop_path)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.pool = Pool(config.embed_dim, config.pool)
        self.head = nn.Linear(config.embed_dim, len(data.class_names))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: convolutions as He et al. 2015, others with deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def num_parameters(self) -> int:
        """The size of all parameters, frozen or not."""
        return sum(p.numel() for p in self.parameters())

    def embed(self, x: Tensor) -> Tensor:
        """What the head sees of the images (N, 1, 28, 28): the pooled tokens, (N, C)."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pool(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, data: DataInfo = FASHION_MNIST) -> Tensor:
    """Logits, float32 (N, 10), of uint8 images (N, 1, 28, 28), in evaluation mode."""
    was_training = model.training
    model.eval()
    chunks = images.split(100)
    logits = torch.cat([model(dataset.normalize(chunk, data)) for chunk in chunks])
    model.train(was_training)
    return logits


# ---- Checkpoints: a zip archive that torch.save makes of one dictionary ----

CHECKPOINT_FORMAT = "fashion-mnist-hybrid 4"  # raised when old files become unreadable


def save_checkpoint(path: str | Path, model: HybridClassifier, **contents: object) -> None:
    """Save the model's configuration and weights, and what else is given.

    The contents are numbers, strings, tensors, and lists and dictionaries of them.
    """
    checkpoint = dict(
        format=CHECKPOINT_FORMAT,
        model_config=asdict(model.config),
        data=model.data._asdict(),
        model={name: tensor.cpu() for name, tensor in model.state_dict().items()},
        **contents,
    )
    # torch.save would hide the reason why a file cannot be written.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[HybridClassifier, dict]:
    """Read what `save_checkpoint` wrote; code in the file is never executed.

    Returns the model in evaluation mode, and the whole dictionary, on the CPU.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or checkpoint["format"] != CHECKPOINT_FORMAT:
            raise ValueError("a wrong checksum or format")
    except Exception as error:  # of a dozen types, if the file is damaged or foreign
        reason = getattr(error, "strerror", "it is damaged or not of this version of the project")
        raise UserError(f"cannot read {path}: {reason}; name another checkpoint") from error
    try:
        data = DataInfo(**checkpoint.get("data", {}))  # the shipped model.pt has none
        model = HybridClassifier(ModelConfig(**checkpoint["model_config"]), data)
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        what = f"{path} does not fit the model that model.py builds"
        raise UserError(f"{what} ({str(error)[:300]}): train again") from error
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def check_classes(path: Path, model: HybridClassifier, data_dir: str | Path) -> None:
    """Refuse a data folder of other classes than the checkpoint's."""
    if dataset.class_names(data_dir) != model.data.class_names:
        what = f"{path} knows other classes than those of {data_dir}"
        raise UserError(f"{what}: give another --data-dir or checkpoint")
