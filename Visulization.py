"""Paint Grad-CAM heatmaps: which places of an image a trained model's decision rests on.

    python Visulization.py                                    some test images of each class, with the shipped model
    python Visulization.py --classes Shirt Coat --only-errors
    python Visulization.py --worst 24                         the test images it is most confidently wrong about
    python Visulization.py --image shoe.jpg "my shirt.png"    your own pictures
    python Visulization.py --checkpoint checkpoints/best.pt   the model that you trained

Writes into HeapImg/ one picture per image, and a contact sheet with a row per class.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import cv2
except ImportError as error:  # libGL.so.1, which opencv-python needs, is missing on most servers
    raise SystemExit(
        f"Visulization.py: error: OpenCV cannot be loaded ({error}); without a desktop use the headless build: "
        f"pip uninstall -y opencv-python && pip install opencv-python-headless"
    ) from None

import dataset
from gradcam import GradCAM
from model import CheckpointError, HybridClassifier, load_checkpoint

SHIPPED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "shipped" / "model.pt"
METHOD = "layercam"
COLOR_MAP = "inferno"
SCALE = 12  # an image pixel becomes so many picture pixels, both ways
MAX_IMAGE_PIXELS = 64_000_000  # of a person's own picture


# ---------------------------------------------------------------------------------------------------------------------
# A person's own pictures


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture of any size and colour and bring it to the form of the data set's images.

    Follows the pipeline of the data set's paper (Xiao et al. 2017, section 2): grey, the background cut away on all
    sides, the longest side scaled to 28 pixels, centred on a dark background. Whether the picture itself has a light or
    a dark background is read off its border; transparent places count as background.

    Returns:
        uint8 array of shape (28, 28).

    Raises:
        ValueError: the file is missing, no picture, damaged, too large, or of one even colour.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("ignore")  # Pillow's remarks on a file that it reads all the same
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{picture.width}x{picture.height} pixels are too many: scale it down first")
            is_deep = picture.mode.startswith(("I", "F"))  # 16 bits or more, which convert() would clip
            picture = ImageOps.exif_transpose(picture)
            if not is_deep:
                picture = picture.convert("RGBA")
                picture.thumbnail((1024, 1024))  # far more than is left of it in the end
            if is_deep:
                gray = np.asarray(picture, dtype=np.float32)
                alpha = np.ones_like(gray)
                top = next(top for top in (1, 255, 65535, np.inf) if not gray.max() > top)
            else:
                gray, alpha = np.moveaxis(np.asarray(picture.convert("LA"), np.float32), 2, 0)
                alpha, top = alpha / 255, 255
    except UnidentifiedImageError:
        raise ValueError("is no picture in a format known here") from None
    except Image.DecompressionBombError:
        raise ValueError("has too many pixels: scale it down first") from None
    except (OSError, SyntaxError) as error:  # Pillow's word for a damaged PNG is SyntaxError
        raise ValueError(getattr(error, "strerror", None) or f"is damaged ({error})") from None

    gray = np.clip(np.nan_to_num(gray) / top, 0, 1)
    border = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
    border_alpha = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    if np.median(border_alpha) > 0.5:
        background = float(np.median(border[border_alpha > 0.5]))
    else:  # cut out: as the data set's garments were, photographed on white, unless it would vanish there
        background = 0.0 if gray[alpha > 0.5].mean() > 0.8 else 1.0
    # The garment may be lighter or darker than its background: what it mostly is becomes light on dark.
    contrast = (gray - background) * alpha
    if np.abs(contrast).max() < 0.02:
        raise ValueError("is of one even colour: there is nothing to classify")
    foreground = contrast / (1 - background) if contrast.sum() > 0 else -contrast / background
    foreground = np.clip(foreground, 0, 1)
    inside = foreground > 0.05 * foreground.max()
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    garment = foreground[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    size = dataset.IMAGE_SIZE
    scale = size / max(garment.shape)
    height, width = (max(1, round(side * scale)) for side in garment.shape)
    garment = cv2.resize(garment, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    image = np.zeros((size, size), np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    image[top : top + height, left : left + width] = garment
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Painting


def paint(image: np.ndarray, heatmap: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Enlarge an image and its heatmap, and lay one over the other.

    Args:
        image: uint8 array (28, 28).
        heatmap: float array (28, 28), 0 to 1.

    Returns:
        Three uint8 RGB arrays (28 * SCALE, 28 * SCALE, 3): the image, with its pixels sharp; the heatmap in colours;
        and the image under the heatmap, which is the more opaque the hotter it is.
    """
    size = tuple(side * SCALE for side in image.shape[::-1])
    gray = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_NEAREST), cv2.COLOR_GRAY2RGB)
    heat = cv2.resize(heatmap.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    colored = (colormaps[COLOR_MAP](heat)[..., :3] * 255).astype(np.uint8)
    opacity = 0.75 * heat[..., None]
    overlay = (gray * (1 - opacity) + colored * opacity).astype(np.uint8)
    return gray, colored, overlay


def side_by_side(panels: tuple[np.ndarray, ...]) -> np.ndarray:
    """Join uint8 RGB arrays of the same height to one, with a white gap between them."""
    gap = np.full((panels[0].shape[0], SCALE, 3), 255, np.uint8)
    return np.hstack([part for panel in panels for part in (gap, panel)][1:])


def colorbar(figure: Figure, axes: object) -> None:
    """Add the scale of the heatmaps to a figure."""
    bar = figure.colorbar(ScalarMappable(cmap=COLOR_MAP), ax=axes, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label("evidence for the class (1 = strongest place)")


def save_overlay(panels: tuple[np.ndarray, ...], title: str, path: Path) -> None:
    """Write the picture of one image: input, heatmap, overlay, a colour bar, and `title` above."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    all_axes = figure.subplots(1, 3)
    for axes, panel, name in zip(all_axes, panels, ("input", "heatmap", "overlay"), strict=True):
        axes.imshow(panel, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.axis("off")
    colorbar(figure, all_axes)
    figure.suptitle(title, parse_math=False)  # a file name may hold a $
    figure.savefig(path, dpi=100)


def save_contact_sheet(rows: dict[str, list[tuple[np.ndarray, str, bool]]], title: str, path: Path) -> None:
    """Write all images on one sheet, a row per class.

    Args:
        rows: for each class name, its images as (panels side by side, caption, whether the model is right).
        title: the line above the sheet.
        path: the PNG file.
    """
    columns = max(len(row) for row in rows.values())
    figure = Figure(figsize=(4.2 * columns + 1.5, 1.75 * len(rows) + 1), layout="constrained")
    all_axes = figure.subplots(len(rows), columns, squeeze=False)
    for (name, row), row_axes in zip(rows.items(), all_axes, strict=True):
        for axes in row_axes:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row_axes[0].set_ylabel(name, fontsize=13)
        for axes, (panel, caption, is_right) in zip(row_axes, row, strict=False):
            axes.imshow(panel, interpolation="nearest")
            axes.set_title(caption, fontsize=11, color="black" if is_right else "crimson")
    colorbar(figure, all_axes)
    figure.suptitle(title, fontsize=14)
    figure.savefig(path, dpi=160)


# ---------------------------------------------------------------------------------------------------------------------
# The two things the script does


def slug(name: str) -> str:
    """A class name as part of a file name: "T-shirt/top" becomes "T-shirt-top"."""
    return name.replace("/", "-").replace(" ", "-")


def default_layers(model: HybridClassifier) -> list[str]:
    """The layers whose heatmaps are the most faithful (benchmarks/faithfulness.py): the stem's ends at 28x28 and 14x14."""
    return model.stage_ends()[:2]


def explain(
    model: HybridClassifier, target_layer: str, images: torch.Tensor, target_class: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Heatmaps (N, 28, 28) and class probabilities (N, 10) of uint8 images (N, 1, 28, 28)."""
    with GradCAM(model, target_layer) as cam:
        maps = cam(dataset.normalize(images), target_class)
        return maps.cpu().numpy(), cam.logits.softmax(dim=1).cpu().numpy()


@torch.no_grad()
def classify(model: HybridClassifier, images: torch.Tensor) -> torch.Tensor:
    """Class probabilities (N, 10) of uint8 images (N, 1, 28, 28)."""
    return torch.cat([model(dataset.normalize(chunk)).softmax(dim=1) for chunk in images.split(500)])


def explained_class(heatmap: np.ndarray, target_class: int | None) -> str:
    """What a caption adds about the class that the heatmap is for; nothing where it is the predicted one."""
    what = "" if target_class is None else f", heatmap for {dataset.CLASS_NAMES[target_class]}"
    return what + ("" if heatmap.any() else ", no evidence for the class in this layer")


def explain_test_images(args: argparse.Namespace, model: HybridClassifier) -> None:
    """Paint test images: `args.num_images` of each of `args.classes`."""
    images, labels = dataset.load(args.data_dir, train=False)
    candidates = torch.arange(len(labels))
    if args.only_errors:
        candidates = candidates[classify(model, images).argmax(dim=1) != labels]
    generator = torch.Generator().manual_seed(args.seed)
    candidates = candidates[torch.randperm(len(candidates), generator=generator)]
    chosen = [candidates[labels[candidates] == label][: args.num_images].sort().values for label in args.classes]
    index = torch.cat(chosen)
    if not len(index):
        raise ValueError("no test image fits: the model makes no error in these classes")
    maps, probabilities = explain(model, args.target_layer, images[index], args.target_class)

    rows: dict[str, list] = {dataset.CLASS_NAMES[label]: [] for label in args.classes}
    for i, heatmap, p in zip(index.tolist(), maps, probabilities, strict=True):
        true, predicted = dataset.CLASS_NAMES[labels[i]], dataset.CLASS_NAMES[p.argmax()]
        panels = paint(images[i, 0].numpy(), heatmap)
        extra = explained_class(heatmap, args.target_class)
        name = f"{i:05d}_{slug(true)}_as_{slug(predicted)}.png"
        title = f"test image {i}: true {true}, predicted {predicted} ({p.max():.1%}){extra}"
        save_overlay(panels, title, args.output_dir / name)
        caption = f"true {true}, predicted {predicted} {p.max():.0%}{extra.replace(', ', chr(10), 1)}"
        rows[true].append((side_by_side(panels), caption, true == predicted))
    sheet = args.output_dir / "contact_sheet.png"
    title = f"Grad-CAM of {args.target_layer} on test images: input, heatmap, overlay"
    save_contact_sheet({name: row for name, row in rows.items() if row}, title, sheet)
    print(f"wrote {len(index)} overlays and {sheet.name} to {args.output_dir}")


def explain_worst(args: argparse.Namespace, model: HybridClassifier) -> None:
    """Paint the `args.worst` test images that the model is most confidently wrong about on one sheet."""
    images, labels = dataset.load(args.data_dir, train=False)
    confidence, predictions = classify(model, images).max(dim=1)
    wrong = torch.isin(labels, torch.tensor(args.classes)) & (predictions != labels)
    index = torch.where(wrong, confidence, -1).argsort(descending=True, stable=True)[: min(args.worst, wrong.sum())]
    if not len(index):
        raise ValueError("no test image fits: the model makes no error in these classes")
    maps, probabilities = explain(model, args.target_layer, images[index], args.target_class)
    cells = []
    for i, heatmap, p in zip(index.tolist(), maps, probabilities, strict=True):
        true, predicted = dataset.CLASS_NAMES[labels[i]], dataset.CLASS_NAMES[p.argmax()]
        caption = f"{i}: true {true} ({p[labels[i]]:.0%})\npredicted {predicted} ({p.max():.0%})"
        cells.append((side_by_side(paint(images[i, 0].numpy(), heatmap)), caption, False))
    columns = 4
    rows = {f"{k + 1}-{k + len(cells[k : k + columns])}": cells[k : k + columns] for k in range(0, len(cells), columns)}
    sheet = args.output_dir / "worst.png"
    title = f"the {len(cells)} most confident of {int(wrong.sum())} errors on test images: input, heatmap, overlay"
    save_contact_sheet(rows, title, sheet)
    print(f"wrote {sheet.name} to {args.output_dir}: {len(cells)} of {int(wrong.sum())} errors")


def explain_own_images(args: argparse.Namespace, model: HybridClassifier) -> int:
    """Paint the pictures in `args.image`, print their three likeliest classes, and return how many failed."""
    failures, written = 0, set()
    for path in args.image:
        try:
            image = read_image(path)
            (heatmap,), (p,) = explain(model, args.target_layer, torch.from_numpy(image)[None, None], args.target_class)
            top = p.argsort()[::-1][:3]
            predicted = dataset.CLASS_NAMES[top[0]]
            stem = f"{Path(path).stem}_as_{slug(predicted)}"
            name = next(n for n in (f"{stem}.png", *(f"{stem}_{k}.png" for k in range(2, 10_000))) if n not in written)
            title = f"{Path(path).name}: {predicted} ({p[top[0]]:.1%}){explained_class(heatmap, args.target_class)}"
            save_overlay(paint(image, heatmap), title, args.output_dir / name)
        except (ValueError, OSError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failures += 1
            continue
        written.add(name)
        print(f"{path}: " + ", ".join(f"{dataset.CLASS_NAMES[c]} {p[c]:.1%}" for c in top))
    if written:
        print(f"wrote {len(written)} overlays to {args.output_dir}")
    return failures


def class_index(text: str) -> int:
    """A class from its name, in any case, or its number; for argparse."""
    names = [name.lower() for name in dataset.CLASS_NAMES]
    if text.lower() in names:
        return names.index(text.lower())
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of: {', '.join(dataset.CLASS_NAMES)}, or 0 to {len(names) - 1}")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A parser of a whole number within a range, for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low:,} to {high:,}")
        return int(text)

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    classes = range(len(dataset.CLASS_NAMES))
    add = parser.add_argument
    add("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT, help="of train.py (default: the shipped one)")
    add("--image", nargs="+", metavar="FILE", help="explain these pictures instead of test images")
    add("--num-images", type=whole_number(1, 50), default=3, metavar="N", help="images of each class (default: 3)")
    add(
        "--classes",
        type=class_index,
        nargs="+",
        default=[*classes],
        metavar="CLASS",
        help="by name or number (default: all)",
    )
    add("--only-errors", action="store_true", help="only test images that the model gets wrong")
    add("--worst", type=whole_number(1, 200), metavar="N", help="one sheet of the N most confident errors")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help="which test images (default: 0)")
    add("--target-layer", default=TARGET_LAYER, metavar="NAME", help=f"layer to look at (default: {TARGET_LAYER})")
    add("--target-class", type=class_index, metavar="CLASS", help="class to explain (default: the predicted one)")
    add("--data-dir", default="data", metavar="PATH", help="folder of Fashion-MNIST (default: data)")
    add("--output-dir", type=Path, default=Path("HeapImg"), metavar="PATH", help="for the pictures (default: HeapImg)")
    args = parser.parse_args()
    args.classes = list(dict.fromkeys(args.classes))
    failures = 0
    try:
        model, _ = load_checkpoint(args.checkpoint)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.image:
            failures = explain_own_images(args, model)
        elif args.worst:
            explain_worst(args, model)
        else:
            explain_test_images(args, model)
    except KeyboardInterrupt:
        print("Visulization.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (CheckpointError, dataset.DataError, ValueError, OSError) as error:
        raise SystemExit(f"Visulization.py: error: {error}") from None
    if failures:
        raise SystemExit(f"Visulization.py: error: {failures} of {len(args.image)} pictures could not be explained")


if __name__ == "__main__":
    main()
