"""Paint heatmaps: which places of an image a trained model's decision rests on.

python Visulization.py --image shoe.jpg photos/    # README.md shows more
"""

from common.console import outlive_output, prepare

if __name__ == "__main__":
    prepare("Visulization.py")

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import dataset
from common.files import UserError, errors_in_one_line, printable, user_path, whole_file
from dataset import CHANNELS, IMAGE_SIZE, pictures_in
from explaining import features
from explaining.explanation import (
    Explanation,
    classify,
    explain,
    in_file_name,
    mask_evidence,
    model_name,
)
from explaining.gallery import save_gallery
from explaining.photo import image_of, read_image
from explaining.sheets import Cell, Sheet, many_sheet, overlay_sheet, paint, save_sheet, scale_of
from gradcam import METHODS, GradCAM, tokens_to_grid
from model import (
    PHOTOGRAPHS_CHECKPOINT,
    SHIPPED_CHECKPOINT,
    HybridClassifier,
    check_classes,
    load_checkpoint,
)
from training.processes import set_threads

METHOD = "hirescam"
LOG_ODDS = True  # not of logits; --versus has a score of its own
NAMES = dict(zip(METHODS, ("Grad-CAM", "Grad-CAM++", "HiResCAM", "LayerCAM"), strict=True))


def default_layers(model: HybridClassifier) -> list[str]:
    """The most faithful (benchmarks/faithfulness.py): the first at 28x28 and at 14x14.

    Without blocks at 28x28, as in `fast`, one at 7x7 is better.
    """
    if model.config.stem_blocks[0]:
        return ["stem.stage0_0", "stem.down1"]
    return ["stem.down2"]


def all_layers(model: HybridClassifier) -> list[str]:
    """From the first convolution to the last block."""
    stem = [f"stem.{name}" for name, _ in model.stem.named_children()]
    return stem + [f"blocks.{i}" for i in range(len(model.blocks))]


def make_cam(model: HybridClassifier, layers: list[str], method: str) -> GradCAM:
    """Grad-CAM of this project's model, whose outputs all have their channels first."""
    reshape = partial(tokens_to_grid, image_size=(IMAGE_SIZE, IMAGE_SIZE), channels=[1])
    try:
        cam = GradCAM(model, layers, method, reshape, log_odds=LOG_ODDS)
        cam(torch.zeros(1, CHANNELS, IMAGE_SIZE, IMAGE_SIZE))  # refuses a layer without places
    except ValueError as error:
        raise UserError(f"--target-layer: {error}") from error
    return cam


def choose_images(
    args: Namespace, model: HybridClassifier, images: Tensor, labels: Tensor, index: Tensor
) -> Tensor:
    """Which images to explain, int64 (N,), of those in `index`."""
    if args.index:
        if not 0 <= min(args.index) <= max(args.index) < len(images):
            raise UserError(f"--index: give numbers from 0 to {len(images) - 1:,}")
        return torch.tensor(args.index)
    index = index[torch.isin(labels[index], torch.tensor(args.classes))]
    if args.average:
        return index
    if args.worst or args.label_errors:
        confidence, predicted = classify(model, images[index]).max(dim=1)
        wrong = predicted != labels[index]
        most_confident = confidence[wrong].argsort(descending=True, stable=True)
        return index[wrong][most_confident[: args.worst]]
    count = args.num_images
    chosen = torch.cat([index[labels[index] == label][:count] for label in args.classes])
    return chosen[:1] if args.compare_layers or args.all_classes else chosen


def explain_images(
    args: Namespace, cam: GradCAM, training: features.TrainingImages | None
) -> list[Explanation]:
    """Explain the chosen images: of the test split, or held out by training."""
    model = cam.model
    check_classes(args.checkpoint, model, args.data_dir)
    kind = "test image"
    images, labels = dataset.load(args.data_dir, train=False, read_image=image_of)
    index = torch.arange(len(images))
    if args.label_errors and len(training.held_out):
        kind, index = "training image", training.held_out
        images, labels = training.images, training.labels
    index = choose_images(args, model, images, labels, index)
    if args.label_errors and len(index):
        tokens = features.embed(model, images[index])
        answers = model.head(tokens).argmax(dim=1)
        index = index[features.labels_of_nearest(tokens, training) == answers][: args.label_errors]
    explanations = []
    for chunk in index.split(200):
        targets = labels[chunk] if args.average else args.target_class
        found = explain(cam, images[chunk], labels[chunk], targets, args.versus)
        for e, i in zip(found, chunk.tolist(), strict=True):
            e.index, e.name = i, f"{kind} {i}"
            e.file_stem = in_file_name(f"{i:05d}_{e.class_names[e.label]}")
        explanations += found
    return explanations


def explain_pictures(args: Namespace, cam: GradCAM) -> list[Explanation]:
    """Explain one's own pictures; print the answers, or what is wrong."""
    explanations = []
    for path in tqdm(args.image, "reading", leave=False, disable=None):
        try:
            image, photograph = read_image(path)
        except UserError as error:
            tqdm.write(f"{printable(path)}: {printable(error)}", sys.stderr)
            continue
        image = torch.from_numpy(image)[None, None]
        (e,) = explain(cam, image, torch.tensor([-1]), args.target_class, args.versus)
        tqdm.write(f"{printable(path)}: {e.answer()}")
        photograph = ImageOps.pad(Image.fromarray(photograph), (400, 400), color="white")
        e.photograph = np.asarray(photograph)
        e.name, e.file_stem = printable(path.name), printable(path.stem)[:50]
        while e.file_stem in [other.file_stem for other in explanations]:  # it is taken
            e.file_stem += "_2"
        explanations.append(e)
    return explanations


def layer_sheet(args: Namespace, cam: GradCAM, e: Explanation) -> Sheet:
    """One image seen from `args.target_layer`, and from every layer."""
    x = dataset.normalize(torch.from_numpy(e.image)[None, None], cam.model.data)
    asked = e.evidence[0]
    versus = asked.versus if asked.versus >= 0 else None
    cells = []
    for layers in [args.target_layer] + [[name] for name in all_layers(cam.model)]:
        layer_cam = make_cam(cam.model, layers, args.method)
        heatmap = layer_cam(x, asked.label, versus)[0].numpy()
        cells.append(Cell(paint(e.image, heatmap, scale_of(e))[1:], " + ".join(layers)))
    title = f"{e.name}: {e.answer()}\n{e.role(asked)}, each layer on its own scale"
    return Sheet(f"{e.file_stem}_layers.png", title, cells, 3)


def class_sheet(cam: GradCAM, e: Explanation) -> Sheet:
    """One image's evidence for each class."""
    labels = torch.arange(len(e.class_names))
    images = torch.from_numpy(e.image).expand(len(labels), 1, -1, -1)
    maps = cam(dataset.normalize(images, cam.model.data), labels, normalize=False).numpy()
    cells = []
    for label, heatmap in enumerate(maps / (maps.max() or 1)):
        cells.append(Cell(paint(e.image, heatmap, scale_of(e))[1:], e.share(label)))
    title = f"{e.name}: {e.answer()}\nthe evidence for each class, on one scale"
    return Sheet(f"{e.file_stem}_classes.png", title, cells, 2)


def average_sheet(explanations: list[Explanation]) -> Sheet:
    """Each class's mean heatmap on its mean image."""
    cells = []
    for label in sorted({e.label for e in explanations}):
        group = [e for e in explanations if e.label == label]
        image = np.mean([e.image for e in group], axis=0).round().astype(np.uint8)
        heatmap = np.mean([e.evidence[0].heatmap for e in group], axis=0)
        panels = paint(image, heatmap / (heatmap.max() or 1), scale_of(group[0]))
        cells.append(Cell(panels, f"{group[0].class_names[label]}: {len(group):,} images"))
    return Sheet("average.png", "mean test images and their mean heatmaps", cells, 2)


def save_arrays(args: Namespace, explanations: list[Explanation]) -> None:
    """Write `heatmaps.npz`, which `numpy.load` reads.

    `maps`, float32 (N, 28, 28), are shares of the evidence for the `target_classes`, signed where
    there is a `versus`. In `indices`, `labels` and `versus`, -1 is none. `masking`, (N, 4), has
    the numbers above the maps; NaN with --average.
    """
    rows = []
    for e in explanations:
        asked = e.evidence[0]
        row = dict(
            names=e.name,
            indices=e.index,
            images=e.image,
            labels=e.label,
            predictions=e.predicted,
            probabilities=e.probabilities,
            target_classes=asked.label,
            versus=asked.versus,
            maps=asked.heatmap,
            masking=asked.probabilities,
        )
        rows.append(row)
    arrays = {name: [row[name] for row in rows] for name in rows[0]}
    arrays |= dict(class_names=e.class_names, target_layers=args.target_layer, method=args.method)
    with whole_file(args.output_dir / "heatmaps.npz") as file:
        np.savez_compressed(file, **arrays)


def doubtful_sheet(explanations: list[Explanation]) -> Sheet:
    """Images whose label is in doubt, which are also printed."""
    for e in explanations:
        print(f"{e.name}: {e.answer()}")
    if explanations[0].name.startswith("test"):
        print("note: these are test images, since training held no images out")
    title = "labels that the model and similar training images contradict"
    return many_sheet("label_errors.png", title, explanations)


def make_sheets(args: Namespace, cam: GradCAM, explanations: list[Explanation]) -> list[Sheet]:
    """The pictures that the flags ask for."""
    if args.average:
        return [average_sheet(explanations)]
    if args.compare_layers:
        return [layer_sheet(args, cam, e) for e in explanations]
    if args.all_classes:
        return [class_sheet(cam, e) for e in explanations]
    if args.worst:
        return [many_sheet("worst.png", "the most confident errors", explanations)]
    if args.label_errors:
        return [doubtful_sheet(explanations)]
    if args.html:
        return []
    sheets = [overlay_sheet(e) for e in explanations]
    if len(explanations) > 1 and not args.image:
        sheets.append(many_sheet("contact_sheet.png", "test images", explanations))
    return sheets


def draw(args: Namespace, cam: GradCAM, explanations: list[Explanation]) -> None:
    """Write what the flags ask for into `args.output_dir`."""
    sheets = make_sheets(args, cam, explanations)
    for sheet in tqdm(sheets, "drawing", leave=False, disable=None):
        save_sheet(args.output_dir, sheet, scale_of(explanations[0]), args.source)
    names = [sheet.file_name for sheet in sheets]
    if args.save_arrays:
        save_arrays(args, explanations)
        names.append("heatmaps.npz")
    if args.html:
        save_gallery(args.output_dir / "index.html", explanations, args.source)
        names.append("index.html")
    wrote = ", ".join(str(args.output_dir / name) for name in names)
    if len(names) > 4:
        wrote = f"{len(names):,} files in {args.output_dir}"
    print(printable(f"wrote {wrote} (model: {model_name(args.checkpoint)})"))


def class_index(text: str, names: Sequence[str]) -> int:
    """A class from its name, exact case first, or from its number."""
    spellings = [*names, *(name.lower() for name in names), *map(str, range(len(names)))]
    for word in (text, text.lower()):
        if word in spellings:
            return spellings.index(word) % len(names)  # each spelling lists all classes
    last = len(names) - 1
    raise UserError(f"class {text!r} is none of: {', '.join(names)}, or 0 to {last}")


def find_classes(args: Namespace, names: Sequence[str]) -> None:
    """Turn the classes that the flags name into numbers."""
    args.classes = [class_index(name, names) for name in args.classes or names]
    if args.target_class is not None:
        args.target_class = class_index(args.target_class, names)
    if args.versus not in (None, "next"):
        args.versus = class_index(args.versus, names)


def count(text: str) -> int:
    """A number of images that a sheet has room for."""
    if text in map(str, range(1, 201)):
        return int(text)
    raise ArgumentTypeError(f"{text}: give a whole number from 1 to 200")


def parse_arguments() -> Namespace:
    """Read the flags, and settle the paths."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    # without half a page of usage
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    add = parser.add_argument
    choose = parser.add_mutually_exclusive_group().add_argument
    show = parser.add_mutually_exclusive_group().add_argument
    yes = dict(action="store_true")
    a_path = dict(type=user_path, metavar="PATH")
    number = dict(type=count, metavar="N")
    several = dict(nargs="+", action="extend")
    label = dict(metavar="CLASS")
    checkpoint = "written by train.py (default: a shipped one; of --image, trained on photographs)"
    add("--checkpoint", **a_path, help=checkpoint)
    choose("--image", **a_path, **several, help="pictures of your own, or folders of them")
    choose("--index", type=int, **several, metavar="N", help="indices of test images")
    choose("--worst", **number, help="one sheet of the N most confident errors")
    choose("--label-errors", **number, help="one sheet of N held-out images with doubtful labels")
    choose("--average", **yes, help="one sheet of each class's mean heatmap")
    choose("--num-images", **number, default="3", help="first images of each class (default: 3)")
    add("--classes", **label, **several, help="only these, by name or number (default: all)")
    add("--method", choices=METHODS, default=METHOD, help=f"default: {METHOD}")
    add("--target-layer", **several, metavar="NAME", help="default: the most faithful")
    add("--target-class", **label, help="class to explain (default: predicted)")
    add("--versus", **label, help='the class to compare with, or "next"')
    similar = dict(type=int, choices=range(1, 11), metavar="N")
    show("--similar", **similar, help="show N similar training images of the likeliest two classes")
    show("--compare-layers", **yes, help="draw an image as each layer sees it")
    show("--all-classes", **yes, help="draw an image's evidence for each class")
    add("--save-arrays", **yes, help="also write heatmaps.npz")
    add("--html", **yes, help="write index.html, a gallery, in place of overlays")
    add("--data-dir", **a_path, default="data", help="of the model's data set (default: data)")
    add("--output-dir", **a_path, help="default: HeapImg, or a folder in it")
    args = parser.parse_args()
    if (args.image or args.index) and args.classes:
        parser.error("--image and --index have no use for --classes")
    one_image = args.compare_layers or args.all_classes
    one_class = args.target_class or args.versus
    if args.average and (one_class or one_image or args.similar or args.html):
        parser.error("--average has no use for flags of single images")
    if args.all_classes and one_class:
        parser.error("--all-classes has no use for --target-class and --versus")
    if args.label_errors:
        args.similar = args.similar or 3
    pictures = []
    for item in args.image or []:
        files = pictures_in(item)
        if item.is_dir() and not files:
            parser.error(f"--image {item}: there are no pictures in this folder")
        pictures += files or [item]
    args.image = list(dict.fromkeys(pictures))
    default = PHOTOGRAPHS_CHECKPOINT if args.image else SHIPPED_CHECKPOINT
    args.checkpoint = path = (args.checkpoint or default).resolve()
    folder = "" if path == default else f"{path.parent.name}_{path.stem}"
    own = "pictures" if args.image else ""
    args.output_dir = args.output_dir or Path("HeapImg", folder, own)
    return args


def source_of_maps(args: Namespace) -> str:
    """What made the heatmaps, in two lines."""
    words = NAMES[args.method]
    if LOG_ODDS and args.versus is None:
        words += " of log-odds"
    if len(args.target_layer) > 1:
        words += f", mean of {len(args.target_layer)} layers"
    layers = " + ".join(args.target_layer)
    return f"{words}\n({layers}; model: {model_name(args.checkpoint)})"


def main() -> None:
    args = parse_arguments()
    with errors_in_one_line("Visulization.py"), outlive_output("Visulization.py"):
        set_threads()
        model, checkpoint = load_checkpoint(args.checkpoint)
        find_classes(args, model.data.class_names)
        args.target_layer = args.target_layer or default_layers(model)
        args.source = source_of_maps(args)
        cam = make_cam(model, args.target_layer, args.method)
        training = None
        if args.similar:
            config = checkpoint.get("train_config", {})
            training = features.load_training_images(args.checkpoint, model, config, args.data_dir)
        if args.image:
            explanations = explain_pictures(args, cam)
        else:
            explanations = explain_images(args, cam, training)
        if not explanations:
            raise UserError("no such image can be explained: ask for others")
        if args.similar:
            options = dict(count=args.similar, of_label=bool(args.label_errors))
            for e in explanations:
                e.similar = features.similar_images(model, e, training, **options)
        if not args.average:
            mask_evidence(model, explanations)
        draw(args, cam, explanations)
        left_out = len(args.image) - len(explanations)
        if left_out > 0:
            raise UserError(f"{left_out} of {len(args.image)} pictures could not be explained")


if __name__ == "__main__":
    main()
