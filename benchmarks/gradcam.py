"""Heatmaps per second: this project's Grad-CAM against the packages grad-cam and captum.

    pip install --no-deps grad-cam ttach && python benchmarks/gradcam.py

The same model, layer, images and classes; every implementation makes maps of 28x28 from logits of its own, all take
turns in this one process, and the median of the rounds counts. The maps have to agree to 1e-5, or there is no figure.
grad-cam stretches each map to reach from 0 to 1; for the comparison, and outside the timing, all maps are.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # whose gradcam.py is imported, not this file

import dataset
from gradcam import GradCAM
from model import load_checkpoint
from training.processes import set_threads

try:
    from captum.attr import LayerAttribution, LayerGradCam
    from pytorch_grad_cam import GradCAM as PackageGradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
except ImportError as error:
    raise SystemExit(
        f"gradcam.py: error: {error}; pip install captum, and pip install --no-deps grad-cam ttach"
    ) from None

TOLERANCE = 1e-5


def stretch(maps: torch.Tensor) -> torch.Tensor:
    """Each map (N, H, W) from 0 to 1."""
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="checkpoints/shipped/model.pt")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 256])
    args = parser.parse_args()
    set_threads()
    model, _ = load_checkpoint(args.checkpoint)
    layer_name = model.stage_ends()[-1]
    layer = model.get_submodule(layer_name)
    images, labels = dataset.load(args.data_dir, train=False)
    ours, captums = GradCAM(model, layer), LayerGradCam(model, layer)

    def by_grad_cam(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with PackageGradCAM(model, [layer]) as cam:
            return torch.from_numpy(cam(x, [ClassifierOutputTarget(int(t)) for t in target]))

    def by_captum(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        maps = captums.attribute(x, target, relu_attributions=True)
        return LayerAttribution.interpolate(maps, x.shape[-2:], "bilinear").detach().squeeze(1)

    implementations: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "this project": lambda x, target: ours(x, target, normalize=False),
        "grad-cam": by_grad_cam,
        "captum": by_captum,
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{args.checkpoint}, layer {layer_name}, {args.rounds} rounds\n")
    columns = ("batch size", *(f"{name}, maps/s" for name in implementations), "against the faster of them")
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    worst = 0.0
    for batch_size in args.batch_sizes:
        x, target = dataset.normalize(images[:batch_size]), labels[:batch_size]
        maps = {name: stretch(make(x, target)) for name, make in implementations.items()}
        worst = max(worst, *((maps[name] - maps["this project"]).abs().max().item() for name in maps))
        if worst > TOLERANCE:
            raise SystemExit(f"gradcam.py: error: the maps differ by up to {worst:.1e}, more than {TOLERANCE:.0e}")
        seconds: dict[str, list[float]] = {name: [] for name in implementations}
        for _ in range(args.rounds):
            for name, make in implementations.items():
                started = time.perf_counter()
                make(x, target)
                seconds[name].append(time.perf_counter() - started)
        rates = {name: batch_size / statistics.median(values) for name, values in seconds.items()}
        ratio = rates["this project"] / max(rates["grad-cam"], rates["captum"])
        print(f"| {batch_size} | {' | '.join(f'{rate:.0f}' for rate in rates.values())} | {ratio:.2f} |", flush=True)
    print(f"\nthe maps agree to {worst:.0e}")


if __name__ == "__main__":
    main()
