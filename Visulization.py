"""Paint heatmaps: which places of an image a trained model's decision rests on.

    python Visulization.py                                    some test images of each class, with the shipped model
    python Visulization.py --checkpoint checkpoints/best.pt   the model that you trained
    python Visulization.py --classes Shirt Coat --only-errors
    python Visulization.py --worst 24                         the test images it is most confidently wrong about
    python Visulization.py --average                          what it looks at in each class, over the whole test split
    python Visulization.py --index 1917 --compare-layers      one test image, seen from every layer
    python Visulization.py --image shoe.jpg photos/           your own pictures
    python Visulization.py --index 1917 --versus Shirt        why this class and not that one
    python Visulization.py --html --save-arrays               a gallery to click through, the raw maps as arrays, too

The pictures of the shipped model go to HeapImg/, those of any other to a folder of its own below that.
"""

from common.console import prepare

if __name__ == "__main__":
    prepare("Visulization.py")

import glob
import itertools
import os
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

try:
    import cv2  # noqa: F401 - for drawing/
except ImportError as error:  # libGL.so.1, which opencv-python needs, is missing on most servers
    advice = "without a desktop: pip uninstall -y opencv-python && pip install opencv-python-headless"
    raise SystemExit(f"Visulization.py: error: OpenCV cannot be loaded ({error}); {advice}") from None

import dataset
from common.files import UserError, errors_in_one_line, printable, whole_file
from dataset import CLASS_NAMES, IMAGE_SIZE
from drawing.explanation import SLUGS, Explanation, classify, explain, heatmaps
from drawing.gallery import save_gallery
from drawing.photo import FORMATS, read_image
from drawing.sheets import (
    SCALE,
    SCALE_LABEL,
    SIGNED_SCALE_LABEL,
    Cell,
    in_rows,
    make_cell,
    on_one_scale,
    paint,
    power,
    save_overlay,
    save_sheet,
)
from gradcam import METHODS, GradCAM
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from training.familiarity import distance, embed
from training.processes import set_threads
from training.settings import flag

METHOD = "layercam"
DEFAULTS = dict(  # of the flags
    checkpoint=SHIPPED_CHECKPOINT,
    image=None,
    index=None,
    worst=None,
    average=False,
    num_images=3,
    classes=list(range(10)),
    only_errors=False,
    seed=0,
    method=METHOD,
    target_layer=None,  # then `default_layers`
    target_class=None,  # then the predicted one
    versus=None,
    compare_layers=False,
    save_arrays=False,
    html=False,
    data_dir=Path("data"),
    output_dir=None,  # then a folder of the model's own
)
# An index is one of the test split's. More pictures than this, 500 at most, would not fit on a sheet.
LIMITS = dict(index=(0, 9_999), worst=(1, 200), num_images=(1, 50), seed=(0, 2**32 - 1))
UNUSED = dict(  # the flags that another one makes useless
    image=("classes", "num_images", "only_errors", "seed", "data_dir"),
    index=("classes", "num_images", "only_errors", "seed"),
    worst=("target_class", "compare_layers", "num_images", "only_errors", "seed"),
    average=("target_class", "versus", "compare_layers", "num_images", "only_errors", "seed", "html"),
    compare_layers=("num_images", "html", "save_arrays"),
)


def default_layers(model: HybridClassifier) -> list[str]:
    """The layers whose maps are most faithful (benchmarks/faithfulness.py): the last at 28x28, the first at 14x14."""
    return [model.stage_ends()[0], "stem.down1"]


def all_layers(model: HybridClassifier) -> dict[str, int]:
    """The layers from the first convolution to the last block: name, and how many places their grid has each way."""
    layers, side = {}, IMAGE_SIZE
    for name, _ in model.stem.named_children():
        side //= 2 if name.startswith("down") else 1
        layers[f"stem.{name}"] = side
    return layers | {f"blocks.{i}": side for i in range(len(model.blocks))}


def save_arrays(args: Namespace, explanations: list[Explanation]) -> None:
    """Write everything as `heatmaps.npz`, an archive that `numpy.load` reads without pickle.

    For N images: `names`, `indices` (in the test split, else -1), `images` uint8 (N, 28, 28), `labels` (-1: not known),
    `predictions`, `probabilities` (N, 10), `target_classes`, `versus` (the class contrasted with, else -1), and `maps`
    float32 (N, 28, 28) for these classes: shares of the evidence, which add up to 1, or, of a contrast, signed ones.
    `true_maps`: for the labels; zeros without one, and of contrasts. `class_names`, `target_layers`, `method`.
    """
    columns = dict(names="name", indices="index", images="image", labels="label", predictions="predicted")
    columns |= dict(probabilities="probabilities", target_classes="target", versus="versus")
    arrays = {column: [getattr(e, name) for e in explanations] for column, name in columns.items()}
    arrays["maps"] = [e.heatmaps[e.target] for e in explanations]
    zeros = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    arrays["true_maps"] = [zeros if e.versus >= 0 else e.heatmaps.get(e.label, zeros) for e in explanations]
    arrays |= dict(class_names=CLASS_NAMES, target_layers=args.target_layer, method=args.method)
    with whole_file(args.output_dir / "heatmaps.npz") as file:
        np.savez_compressed(file, **arrays)


def choose_images(args: Namespace, model: HybridClassifier, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The indices of the test images that the flags ask for, int64 (N,)."""
    if args.index:
        return torch.tensor(args.index)
    index = torch.isin(labels, torch.tensor(args.classes)).nonzero().flatten()
    if args.only_errors or args.worst:
        confidence, predicted = classify(model, images[index]).max(dim=1)
        wrong = predicted != labels[index]
        index = index[wrong][confidence[wrong].argsort(descending=True, stable=True)]
        print(f"errors in these classes: {len(index)}")
        if not len(index):
            raise UserError("the model makes no error in these classes: name others with --classes")
    if args.worst or args.average:
        return index[: args.worst]
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(args.seed))]
    by_class = [index[labels[index] == label][: args.num_images].sort().values for label in args.classes]
    return torch.cat(by_class)[: 1 if args.compare_layers else None]


def find_pictures(given: list[Path]) -> list[Path]:
    """The pictures in folders, and those of wildcards that no shell has expanded; whatever else is given stays.

    A file that is found twice, under whatever names, is taken once.
    """
    found, endings = [], {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    endings |= {".mpo", ".heic", ".heif"}  # a kind of JPEG; what must be exported first, to say so
    matches = [[path] if os.path.exists(path) else sorted(map(Path, glob.glob(str(path)))) or [path] for path in given]
    for path in itertools.chain(*matches):
        if not os.path.isdir(path):
            found.append(path)
            continue
        try:
            names = [name for name in sorted(os.listdir(path)) if not name.startswith(".")]
        except OSError as error:
            raise UserError(f"--image {printable(path)}: {error.strerror}; name another folder") from error
        found += [Path(path, name) for name in names if Path(name).suffix.lower() in endings]
    if not found:
        raise UserError("--image: there are no pictures in this folder; name another one")
    once = {}
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def doubt(model: HybridClassifier, image: torch.Tensor, familiar: dict) -> str:
    """Why the answer for a uint8 image (1, 28, 28) may mean little, or "": how far it is from the training images."""
    turns = torch.stack([image.rot90(quarter, (1, 2)) for quarter in range(4)])
    distances = distance(embed(model, turns), familiar["means"], familiar["precision"]) / familiar["limit"]
    if not distances[0] > 1:  # or not a number, after a run on a handful of images
        return ""
    if distances.min() < 0.5:
        turn = ("", "by 90 degrees to the left", "upside down", "by 90 degrees to the right")[distances.argmin()]
        return f"turned {turn}, it would look more familiar to the model"
    return "the model has never seen anything like it"


def explain_own_images(args: Namespace, cam: GradCAM) -> list[Explanation]:
    """Explain the pictures `args.image`, and print their likeliest classes; report those that cannot be read."""
    explanations = []
    for path in tqdm(args.image, "pictures", leave=False, disable=len(args.image) < 10):
        shown = printable(path)
        try:
            pixels, photograph, note = read_image(path)
        except UserError as error:
            tqdm.write(f"{shown}: {printable(error)}", file=sys.stderr)
            continue
        image = torch.from_numpy(pixels)[None]
        (e,) = explain(cam, image[None], torch.tensor([-1]), [-1], args.target_class, args.versus)
        likeliest = e.probabilities.argsort()[::-1][:3]
        answer = ", ".join(f"{CLASS_NAMES[c]} {e.probabilities[c]:.1%}" for c in likeliest)
        tqdm.write(f"{shown}: {answer}")
        notes = [note]
        if args.familiar:
            notes.append(doubt(cam.model, image, args.familiar))
        for note in filter(None, notes):
            tqdm.write(f"  note: {note}")
        e.name = printable(path.name)
        size = (IMAGE_SIZE * SCALE, IMAGE_SIZE * SCALE)  # as large as it is drawn
        e.photograph = np.asarray(ImageOps.contain(Image.fromarray(photograph), size))
        e.stem = os.fsencode(path.stem)[:200].decode(errors="ignore")  # a file's name has 255 bytes at most
        while e.stem in [other.stem for other in explanations]:  # of another folder
            e.stem += "_2"
        explanations.append(e)
    return explanations


def draw_layers(args: Namespace, cam: GradCAM, e: Explanation, path: Path) -> None:
    """One image seen from every layer, on one scale, the map of `args.target_layer` first."""
    image, target = torch.from_numpy(e.image)[None, None], torch.tensor([e.target])
    versus = torch.tensor([e.versus]) if e.versus >= 0 else None
    maps = {" + ".join(args.target_layer): e.heatmaps[e.target]}
    for layer, side in all_layers(cam.model).items():
        (maps[f"{layer}, {side}x{side}"],) = heatmaps(GradCAM(cam.model, layer, args.method), image, target, versus)
    gamma = 0.5  # a coarse layer's strongest place holds many times the share of a fine one's
    cells = [
        Cell(paint(e.image, power(heatmap, gamma), e.versus >= 0)[1:], caption)
        for caption, heatmap in on_one_scale(maps).items()
    ]
    title = f"{e.name}: {e.answer()}\n{args.method} {e.role(e.target)}: heatmap, overlay"
    label = f"{SCALE_LABEL if versus is None else SIGNED_SCALE_LABEL}, in any layer, square root scale"
    save_sheet(in_rows(cells, 3), title, label, args.model_name, path, versus is not None, gamma)


def draw_sheet(args: Namespace, explanations: list[Explanation]) -> None:
    """One sheet of test images: the worst errors, or each class's mean, or a row of each class."""
    method = f"{args.method} of {' + '.join(args.target_layer)}"
    is_signed = args.versus is not None
    scale = SIGNED_SCALE_LABEL if is_signed else f"{SCALE_LABEL}, in the image"
    members = {label: [e for e in explanations if e.label == label] for label in args.classes}
    if args.worst:
        shown = "heatmap and overlay of the contrast" if is_signed else "overlays for both classes"
        name, title = "worst.png", f"the {len(explanations)} most confident errors: input, {shown}"
        rows = in_rows([make_cell(e, f"{e.index}: {e.answer()}".replace(", ", ",\n")) for e in explanations], 3)
    elif args.average:
        name, title = "average.png", f"{method}, test images by class:\nmean image, mean heatmap for the class, overlay"
        means = {k: np.mean([e.heatmaps[k] for e in group], axis=0) for k, group in members.items()}
        cells, scale = [], "mean share of the evidence (1 = largest of all)"
        for label, heatmap in on_one_scale(means).items():
            mean_image = np.mean([e.image for e in members[label]], axis=0).round().astype(np.uint8)
            right = np.mean([e.predicted == label for e in members[label]])
            caption = f"{CLASS_NAMES[label]}: {len(members[label]):,} images, {right:.0%} right"
            cells.append(Cell(paint(mean_image, heatmap), caption))
        rows = in_rows(cells, 2)
    else:
        name, title = "contact_sheet.png", f"{method}, test images: input, heatmap, overlay\n"
        if not is_signed:
            title += "where the true class is another: input, overlay for the one, overlay for the other"
        rows = [(CLASS_NAMES[k], [make_cell(e, e.answer()) for e in group]) for k, group in members.items() if group]
    save_sheet(rows, title.strip(), scale, args.model_name, args.output_dir / name, is_signed)


def class_index(text: str) -> int:
    """A class from its name, in any case, or its number; for argparse."""
    known = [*map(str.lower, CLASS_NAMES), *map(str, range(len(CLASS_NAMES)))]
    if text.lower() not in known:
        raise ArgumentTypeError(f"{text!r} is none of: {', '.join(CLASS_NAMES)}, or 0 to 9")
    return known.index(text.lower()) % len(CLASS_NAMES)


def other_class(text: str) -> int:
    """A class as `class_index` takes it, or -1 for "next"; for argparse."""
    return -1 if text.lower() == "next" else class_index(text)


def parse_arguments() -> Namespace:
    """The flags; one that another makes useless is refused, even if it repeats the default."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], argument_default=SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # without half a page of usage
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group().add_argument
    path = dict(type=lambda text: Path(os.path.expanduser(text)), metavar="PATH")  # no shell expands --flag=~/x
    number = dict(type=int, metavar="N")
    one_class = dict(type=class_index, metavar="CLASS")
    several = dict(nargs="+", action="extend")  # `--index 3 --index 5` is both
    yes = dict(action="store_true")
    add("--checkpoint", **path, help="of train.py (default: the shipped one)")
    what("--image", **path, **several, help="explain these pictures, or folders of them, instead of test images")
    what("--index", **number, **several, help="explain these test images")
    what("--worst", **number, help="one sheet of the N most confident errors")
    what("--average", **yes, help="one sheet of each class's mean heatmap over the test split")
    add("--num-images", **number, help="images of each class (default: 3)")
    add("--classes", **one_class, **several, help="by name or number (default: all)")
    add("--only-errors", **yes, help="only test images that the model gets wrong")
    add("--seed", **number, help="which test images (default: 0)")
    add("--method", choices=METHODS, help=f"how the map is computed (default: {METHOD})")
    add("--target-layer", **several, metavar="NAME", help="layers to average (default: last at 28x28, first at 14x14)")
    add("--target-class", **one_class, help="class to explain (default: the predicted one)")
    add("--versus", type=other_class, metavar="CLASS", help="compare with this class; next: with the likeliest other")
    add("--compare-layers", **yes, help="each image (--index, --image; else one) seen from every layer, a sheet each")
    add("--save-arrays", **yes, help="also write heatmaps.npz: maps, labels, predictions, probabilities")
    add("--html", **yes, help="also write index.html, a gallery to filter by class and result")
    add("--data-dir", **path, help="folder of Fashion-MNIST (default: data)")
    add("--output-dir", **path, help="for the pictures (default: HeapImg, or a folder in it per model)")
    given = vars(parser.parse_args())
    for name in ("index", "classes", "target_layer"):
        if name in given:
            given[name] = list(dict.fromkeys(given[name]))  # each once, in the order given
    for name, (low, high) in LIMITS.items():
        if name in given and not all(low <= n <= high for n in np.ravel(given[name])):
            parser.error(f"{flag(name)} {given[name]}: give a whole number from {low:,} to {high:,}")
    if len(given.get("index", [])) > 500:
        parser.error("--index: give at most 500 images")
    for name, others in UNUSED.items():
        unused = [flag(other) for other in others if other in given]
        if name in given and unused:
            parser.error(f"{flag(name)} has no use for {' and '.join(unused)}: leave it out")
    if "compare_layers" in given and len(given.get("classes", [])) > 1:
        parser.error("--compare-layers shows an image of one class: give only one with --classes")
    return Namespace(**DEFAULTS | given)


def training_accuracy(checkpoint: dict) -> float:
    """The accuracy that a checkpoint's weights reached while they were trained; 1 where it does not say."""
    history = checkpoint.get("history", [])
    rows = history[: checkpoint.get("epoch", len(history))]
    if not rows:
        return 1.0
    last = rows[-1]  # the epoch of these weights; later ones may follow
    if "val_accuracy" in last:
        return last["val_accuracy"]
    if checkpoint.get("train_config", {}).get("cutmix"):
        return 1.0  # training accuracy is low by design
    return last.get("train_accuracy", 1.0)


def load_model(args: Namespace) -> GradCAM:
    """Load the checkpoint, and complete `args` with the layers, the model's name and the folder for its pictures."""
    model, checkpoint = load_checkpoint(args.checkpoint)
    path = args.checkpoint.resolve()
    args.model_name = printable("/".join(path.parts[-2:]))
    folder = "" if path == SHIPPED_CHECKPOINT.resolve() else f"{path.parent.name}_{path.stem}"
    args.output_dir = args.output_dir or Path("HeapImg", folder)
    args.target_layer = args.target_layer or default_layers(model)
    args.familiar = checkpoint.get("familiar")
    accuracy = training_accuracy(checkpoint)
    if accuracy < 0.7:  # as after a fraction of an epoch
        print(f"note: {args.model_name} reached only {accuracy:.0%} in training: its maps light up the background, too")
    try:
        cam = GradCAM(model, args.target_layer, args.method)
        cam(torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE))  # complains of a layer without places
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise UserError(f"--target-layer: {error}") from error
    except OSError as error:
        raise UserError(f"--output-dir {args.output_dir}: {error.strerror}; choose another folder") from error
    return cam


def main() -> None:
    args = parse_arguments()
    with errors_in_one_line("Visulization.py"):
        set_threads()
        cam = load_model(args)
        if args.image:
            args.image = find_pictures(args.image)
            explanations = explain_own_images(args, cam)
        else:
            images, labels = dataset.load(args.data_dir, train=False)
            index = choose_images(args, cam.model, images, labels)
            targets = labels[index] if args.average else args.target_class
            columns = images[index], labels[index], index.tolist(), targets, args.versus
            explanations = explain(cam, *columns, with_trust=not args.average)
            if args.worst or args.average or (len(explanations) > 1 and not args.compare_layers):
                draw_sheet(args, explanations)
        for e in explanations if not (args.worst or args.average) else []:
            if args.compare_layers:
                draw_layers(args, cam, e, args.output_dir / f"{e.stem}_layers.png")
            else:
                name = SLUGS[e.predicted]
                if e.versus >= 0:
                    name = f"{SLUGS[e.target]}_not_{SLUGS[e.versus]}"
                elif args.target_class not in (None, e.predicted):
                    name += f"_for_{SLUGS[args.target_class]}"
                save_overlay(e, args.model_name, args.output_dir / f"{e.stem}_as_{name}.png")
        if args.save_arrays and explanations:
            save_arrays(args, explanations)
        if args.html and explanations:
            save_gallery(explanations, args.model_name, args.method, args.target_layer, args.output_dir / "index.html")
        if explanations:
            where = args.output_dir / "index.html" if args.html else args.output_dir
            print(f"images explained: {len(explanations):,}; the pictures are in {printable(where)}")
        if args.image and (failed := len(args.image) - len(explanations)):
            raise UserError(f"{failed} of {len(args.image)} pictures could not be explained")


if __name__ == "__main__":
    main()
