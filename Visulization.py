"""Paint heatmaps: which places of an image a trained model's decision rests on.

    python Visulization.py --image shoe.jpg photos/

README.md shows more. The pictures of the shipped model go to HeapImg/, those of another one to a
folder of its own there.
"""

from common.console import outlive_output, prepare

if __name__ == "__main__":
    prepare("Visulization.py")

import glob
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

try:
    import cv2  # noqa: F401 - for explaining/
except ImportError as error:  # libGL.so.1, which opencv-python needs, is missing on most servers
    advice = "pip uninstall -y opencv-python && pip install opencv-python-headless"
    raise SystemExit(
        f"Visulization.py: error: OpenCV cannot be loaded ({error}); without a desktop: {advice}"
    ) from None

import dataset
from common.files import UserError, errors_in_one_line, printable, whole_file
from dataset import CLASS_NAMES, IMAGE_SIZE
from explaining.explanation import Explanation, classify, explain
from explaining.features import familiarity_note, feature_statistics
from explaining.gallery import save_gallery
from explaining.photo import FORMATS, read_image
from explaining.sheets import (
    SCALE,
    SCALES,
    Cell,
    Row,
    in_rows,
    make_cell,
    on_one_scale,
    paint,
    power,
    save_overlay,
    save_sheet,
)
from gradcam import METHODS, GradCAM, tokens_to_grid
from model import SHIPPED_CHECKPOINT, HybridClassifier, load_checkpoint
from training.processes import set_threads
from training.settings import flag

METHOD = "layercam"
# More pictures than this are too many for a sheet; an index is one of the test split's.
LIMITS = dict(index=(0, 9_999), worst=(1, 200), num_images=(1, 50), seed=(0, 2**32 - 1))
CHOICE = ("num_images", "only_errors", "seed")  # of test images
UNUSED = dict(  # the flags that another one makes useless
    image=("classes", *CHOICE),
    index=("classes", *CHOICE),
    worst=("target_class", "compare_layers", *CHOICE),
    average=("target_class", "versus", "compare_layers", *CHOICE, "html"),
    compare_layers=("num_images",),
)
# A folder's files that are taken; HEIC is not read, but the message says what to do.
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
ENDINGS |= {".mpo", ".heic", ".heif"}


def default_layers(model: HybridClassifier) -> list[str]:
    """The most faithful layers (benchmarks/faithfulness.py): last at 28x28, first at 14x14."""
    return [model.stage_ends()[0], "stem.down1"]


def all_layers(model: HybridClassifier) -> list[str]:
    """The layers from the first convolution to the last block."""
    stem = [f"stem.{name}" for name, _ in model.stem.named_children()]
    return stem + [f"blocks.{i}" for i in range(len(model.blocks))]


def make_cam(model: HybridClassifier, layers: str | list[str], method: str) -> GradCAM:
    """Grad-CAM of this project's model, whose 4-D outputs all have their channels first."""
    reshape = partial(tokens_to_grid, image_size=(IMAGE_SIZE, IMAGE_SIZE), channels=[1])
    return GradCAM(model, layers, method, reshape)


def load_model(args: Namespace) -> GradCAM:
    """Load the checkpoint, and complete `args` with its settings, name, layers and folder."""
    model, checkpoint = load_checkpoint(args.checkpoint)
    path = args.checkpoint.resolve()
    folder = "" if path == SHIPPED_CHECKPOINT.resolve() else f"{path.parent.name}_{path.stem}"
    args.output_dir = args.output_dir or Path("HeapImg", folder)
    args.train_config = checkpoint.get("train_config", {})
    args.model_name = printable("/".join(path.parts[-2:]))
    args.target_layer = args.target_layer or default_layers(model)
    rows = checkpoint.get("history", [])
    reached = [row.get("val_accuracy", row.get("train_accuracy", 1)) for row in rows]
    accuracy = max(reached, default=1)
    if accuracy < 0.7:  # as after a fraction of an epoch
        found = f"{args.model_name} reached only {accuracy:.0%} in training"
        print(f"note: {found}: its maps light up the background, too")
    try:
        cam = make_cam(model, args.target_layer, args.method)
        cam(torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE))  # complains of a layer without places
    except ValueError as error:
        raise UserError(f"--target-layer: {error}") from error
    return cam


def choose_images(
    args: Namespace, model: HybridClassifier, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
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
    by_class = [index[labels[index] == label][: args.num_images] for label in args.classes]
    chosen = torch.cat([some.sort().values for some in by_class])
    return chosen[:1] if args.compare_layers else chosen


def explain_test_images(args: Namespace, cam: GradCAM) -> list[Explanation]:
    """Explain the test images that the flags ask for."""
    images, labels = dataset.load(args.data_dir, train=False)
    index = choose_images(args, cam.model, images, labels)
    targets = labels[index] if args.average else args.target_class
    columns = images[index], labels[index], index.tolist(), targets, args.versus
    return explain(cam, *columns, with_masks=not args.average)


def find_pictures(given: list[Path]) -> list[Path]:
    """The pictures that are given, and those in the folders that are; each file once."""
    found = []
    for path in given:
        if not os.path.isdir(path):
            matches = sorted(glob.glob(str(path)))  # a wildcard that no shell has expanded
            is_pattern = matches and not os.path.exists(path)
            found += map(Path, matches) if is_pattern else [path]
            continue
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            raise UserError(f"--image {path}: {error.strerror}; name another folder") from error
        names = [name for name in names if not name.startswith(".")]
        found += [path / name for name in names if Path(name).suffix.lower() in ENDINGS]
    if not found:
        raise UserError("--image: there are no pictures in this folder; name another one")
    return list({os.path.realpath(path): path for path in found}.values())


def explain_own_images(args: Namespace, cam: GradCAM) -> list[Explanation]:
    """Explain the pictures `args.image` and print their likeliest classes, or what is wrong."""
    explanations, statistics = [], None
    try:
        config, data_dir = args.train_config, args.data_dir
        statistics = feature_statistics(args.checkpoint, cam.model, config, data_dir)
    except UserError as error:  # no data set
        note = f"note: whether a picture is familiar to the model is not told: {printable(error)}"
        print(note, file=sys.stderr)
    for path in tqdm(args.image, "pictures", leave=False, disable=len(args.image) < 10):
        name = printable(path)
        try:
            pixels, photograph, note = read_image(path)
        except UserError as error:
            tqdm.write(f"{name}: {printable(error)}", file=sys.stderr)
            continue
        image = torch.from_numpy(pixels)[None]
        unknown = torch.tensor([-1])
        (e,) = explain(cam, image[None], unknown, [-1], args.target_class, args.versus)
        likeliest = e.probabilities.argsort()[::-1][:3]
        answer = ", ".join(f"{CLASS_NAMES[c]} {e.probabilities[c]:.1%}" for c in likeliest)
        tqdm.write(f"{name}: {answer}")
        notes = [note]
        if statistics:
            notes.append(familiarity_note(cam.model, image, statistics))
        for note in filter(None, notes):
            tqdm.write(f"  note: {note}")
        e.name = printable(path.name)
        size = (IMAGE_SIZE * SCALE, IMAGE_SIZE * SCALE)  # as large as it is drawn
        e.photograph = np.asarray(ImageOps.pad(Image.fromarray(photograph), size, color="white"))
        # A file's name has 255 bytes at most.
        e.file_stem = os.fsencode(path.stem)[:200].decode(errors="ignore")
        while e.file_stem in [other.file_stem for other in explanations]:  # of another folder
            e.file_stem += "_2"
        explanations.append(e)
    return explanations


def draw_layers(args: Namespace, cam: GradCAM, e: Explanation) -> None:
    """One image seen from every layer, on one scale, the map of `args.target_layer` first."""
    x = dataset.normalize(torch.from_numpy(e.image)[None, None])
    is_signed = e.versus >= 0
    versus = e.versus if is_signed else None
    maps = {" + ".join(args.target_layer): e.heatmaps[e.target]}
    for layer in all_layers(cam.model):
        layer_cam = make_cam(cam.model, layer, args.method)
        maps[layer] = layer_cam(x, e.target, versus, normalize=False)[0].numpy()
    gamma = 0.5  # a coarse layer's strongest place holds many times the share of a fine one's
    cells = []
    for caption, heatmap in on_one_scale(maps).items():
        _, *panels = paint(e.image, power(heatmap, gamma), is_signed)
        cells.append(Cell(panels, caption))
    title = f"{e.name}: {e.answer()}\n{args.method} {e.role(e.target)}: heatmap, overlay"
    scale = f"{SCALES[is_signed]}, in any layer, square root scale"
    path = args.output_dir / f"{e.file_stem}_layers.png"
    save_sheet(in_rows(cells, 3), title, scale, args.model_name, path, is_signed, gamma)


def rows_of_means(args: Namespace, explanations: list[Explanation]) -> list[Row]:
    """Each class's mean heatmap on its mean image."""
    groups = {k: [e for e in explanations if e.label == k] for k in args.classes}
    means = {k: np.mean([e.heatmaps[k] for e in group], axis=0) for k, group in groups.items()}
    cells = []
    for label, heatmap in on_one_scale(means).items():
        group = groups[label]
        mean_image = np.mean([e.image for e in group], axis=0).round().astype(np.uint8)
        right = np.mean([e.predicted == label for e in group])
        caption = f"{CLASS_NAMES[label]}: {len(group):,} images, {right:.0%} right"
        cells.append(Cell(paint(mean_image, heatmap), caption))
    return in_rows(cells, 2)


def draw_sheet(args: Namespace, explanations: list[Explanation]) -> None:
    """One sheet of test images: the worst errors, or each class's mean, or a row of each class."""
    title = f"{args.method} of {' + '.join(args.target_layer)}: "
    is_signed = args.versus is not None
    scale = SCALES[is_signed]
    if args.worst:
        name = "worst.png"
        title += f"the {len(explanations)} most confident errors"
        captions = [f"{e.index}: {e.answer()}".replace(", ", ",\n") for e in explanations]
        rows = in_rows(list(map(make_cell, explanations, captions)), 3)
    elif args.average:
        name = "average.png"
        title += "each class's mean test image,\nthe mean heatmap for the class, and both"
        scale = "mean share of the evidence (1 = largest of all)"
        rows = rows_of_means(args, explanations)
    else:
        name = "contact_sheet.png"
        title += "test images, heatmaps, overlays"
        cells = {label: [] for label in args.classes}
        for e in explanations:
            cells[e.label].append(make_cell(e, e.answer()))
        rows = [(CLASS_NAMES[label], row) for label, row in cells.items() if row]
    save_sheet(rows, title, scale, args.model_name, args.output_dir / name, is_signed)


def save_arrays(args: Namespace, explanations: list[Explanation]) -> None:
    """Write `heatmaps.npz`, which `numpy.load` reads: arrays of N images, and what they are of.

    In `indices`, `labels` and `versus`, -1 is none. `maps`, float32 (N, 28, 28), are those for the
    `target_classes`: shares of the evidence, which add up to 1; signed where `versus` is a class.
    `true_maps` are those for the labels; zeros where there is none, and of contrasts.
    """
    columns = dict(names="name", indices="index", images="image", labels="label", versus="versus")
    columns |= dict(predictions="predicted", probabilities="probabilities", target_classes="target")
    arrays = {key: [getattr(e, field) for e in explanations] for key, field in columns.items()}
    arrays["maps"] = maps = np.stack([e.heatmaps[e.target] for e in explanations])
    arrays["true_maps"] = np.zeros_like(maps)
    for i, e in enumerate(explanations):
        if e.label in e.heatmaps and e.versus < 0:
            arrays["true_maps"][i] = e.heatmaps[e.label]
    arrays |= dict(class_names=CLASS_NAMES, target_layers=args.target_layer, method=args.method)
    with whole_file(args.output_dir / "heatmaps.npz") as file:
        np.savez_compressed(file, **arrays)


def draw(args: Namespace, cam: GradCAM, explanations: list[Explanation]) -> None:
    """Write what the flags ask for into `args.output_dir`, and say where it is."""
    is_one_sheet = args.worst or args.average
    is_several = len(explanations) > 1 and not args.image and not args.compare_layers
    if is_one_sheet or is_several:
        draw_sheet(args, explanations)
    for e in explanations if not is_one_sheet else []:
        if args.compare_layers:
            draw_layers(args, cam, e)
        else:
            save_overlay(e, args.model_name, args.output_dir / e.file_name())
    if args.save_arrays:
        save_arrays(args, explanations)
    where = args.output_dir
    if args.html:
        where /= "index.html"
        save_gallery(explanations, args.model_name, args.method, args.target_layer, where)
    print(f"images explained: {len(explanations):,}; the pictures are in {printable(where)}")


def class_index(text: str) -> int:
    """A class from its name, in any case, or its number; for argparse."""
    names = [name.lower() for name in CLASS_NAMES]
    if text.lower() in names:
        return names.index(text.lower())
    if text in map(str, range(len(names))):
        return int(text)
    raise ArgumentTypeError(f"{text!r} is none of: {', '.join(CLASS_NAMES)}, or 0 to 9")


def make_parser() -> ArgumentParser:
    """The flags; a default that a flag does not have is settled by `load_model`."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    # without half a page of usage
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group().add_argument
    # no shell expands --flag=~/x
    path = dict(type=lambda text: Path(os.path.expanduser(text)), metavar="PATH")
    number = dict(type=int, metavar="N")
    one_class = dict(type=class_index, metavar="CLASS")
    other = dict(type=lambda text: -1 if text == "next" else class_index(text), metavar="CLASS")
    several = dict(nargs="+", action="extend")  # `--index 3 --index 5` is both
    yes = dict(action="store_true")
    checkpoint = "checkpoint written by train.py (default: the shipped one)"
    add("--checkpoint", **path, default=SHIPPED_CHECKPOINT, help=checkpoint)
    what("--image", **path, **several, help="pictures, or folders of them, to explain instead")
    what("--index", **number, **several, help="indices of test images to explain")
    what("--worst", **number, help="draw one sheet of the N most confident errors")
    what("--average", **yes, help="draw one sheet of each class's mean heatmap")
    add("--num-images", **number, default=3, help="test images of each class (default: 3)")
    add("--classes", **one_class, **several, help="classes by name or number (default: all)")
    add("--only-errors", **yes, help="only test images that the model gets wrong")
    add("--seed", **number, default=0, help="seed of the choice of test images (default: 0)")
    add("--method", choices=METHODS, default=METHOD, help=f"kind of map (default: {METHOD})")
    layers = "layers to average over (default: last at 28x28, first at 14x14)"
    add("--target-layer", **several, metavar="NAME", help=layers)
    add("--target-class", **one_class, help="class to explain (default: the predicted one)")
    add("--versus", **other, help='class to compare with, or "next": the likeliest other')
    add(
        "--compare-layers",
        **yes,
        help="draw an image, or each that is named, in all layers",
    )
    add("--save-arrays", **yes, help="also write heatmaps.npz: maps, labels and probabilities")
    add("--html", **yes, help="also write index.html, a gallery to filter and to sort")
    add("--data-dir", **path, default=Path("data"), help="folder of Fashion-MNIST (default: data)")
    add("--output-dir", **path, help="folder for the pictures (default: HeapImg, or one in it)")
    return parser


def parse_arguments() -> Namespace:
    """Read the flags; one that another makes useless is refused, even if it repeats the default."""
    parser = make_parser()
    args = parser.parse_args()
    parser.set_defaults(**dict.fromkeys(vars(args)))
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    for name, (low, high) in LIMITS.items():
        if name in given and not all(low <= n <= high for n in np.ravel(given[name])):
            advice = f"give a whole number from {low:,} to {high:,}"
            parser.error(f"{flag(name)} {given[name]}: {advice}")
    if len(given.get("index", [])) > 500:
        parser.error("--index: give at most 500 images")
    for name, others in UNUSED.items():
        unused = [flag(other) for other in others if other in given]
        if name in given and unused:
            parser.error(f"{flag(name)} has no use for {' and '.join(unused)}: leave it out")
    if args.compare_layers and len(given.get("classes", ())) > 1:
        parser.error("--compare-layers draws one image: name one class")
    args.classes = args.classes or range(len(CLASS_NAMES))
    for name in ("index", "classes", "target_layer"):  # each once, in the order given
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or ())))
    return args


def main() -> None:
    args = parse_arguments()
    with errors_in_one_line("Visulization.py"), outlive_output("Visulization.py"):
        set_threads()
        cam = load_model(args)
        if args.image:
            args.image = find_pictures(args.image)
            explanations = explain_own_images(args, cam)
        else:
            explanations = explain_test_images(args, cam)
        if explanations:
            draw(args, cam, explanations)
        if args.image and len(explanations) < len(args.image):
            failed = len(args.image) - len(explanations)
            raise UserError(f"{failed} of {len(args.image)} pictures could not be explained")


if __name__ == "__main__":
    main()
