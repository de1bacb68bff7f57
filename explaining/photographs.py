"""Real photographs to train on, from the clothing dataset of Alexey Grigorev and others (CC0).

    git clone --depth 1 https://github.com/alexeygrigorev/clothing-dataset
    python -m explaining.photographs clothing-dataset

makes data/photographs, a folder for `--data-dir`: its training split mixes Fashion-MNIST and what
`--image` makes of the photographs; its test split has other people's photographs.
"""

import argparse
import csv
import os
import struct
from pathlib import Path

import numpy as np
from tqdm.contrib.concurrent import thread_map

import dataset
from common.files import UserError, errors_in_one_line, user_path, whole_file
from dataset import CLASS_LIST, CLASS_NAMES
from explaining.photo import image_of

CLASSES = dict(Pants="Trouser", Dress="Dress", Shirt="Shirt", Outwear="Coat")
CLASSES |= {"Blazer": "Coat", "T-Shirt": "T-shirt/top", "Longsleeve": "Pullover"}
# Contributors of the `test` folder of clothing-dataset-small, which is never trained on.
TEST_SENDERS = {46, 204, 227, 309, 310}
HELD_OUT = 3  # the contributors whose number modulo 6 is this
MIXED_IN = 10_000  # images of Fashion-MNIST, which would be forgotten without them
REPEAT = 4  # times that a photograph is in the training split
# Classes judged by eye: of shoes, but pumps and formal ones, and none where the table is wrong.
# Names are cut to six digits.
SEEN = Path(__file__).with_suffix(".csv")


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def class_of(row: dict[str, str], seen: dict[str, str]) -> str:
    """The class of a row of images.csv; "" if it has none of ours, or is not to train on."""
    if row["kids"] == "True" or int(row["sender_id"]) in TEST_SENDERS:
        return ""
    return seen.get(row["image"][:6], CLASSES.get(row["label"], ""))


def read_photographs(clone: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The photographs of a clone that have a class; those that cannot be read are left out.

    Returns images, uint8 (N, 28, 28), labels, uint8 (N,), and which are held out, bool (N,): no
    contributor has photographs on both sides.
    """
    try:
        rows = read_table(clone / "images.csv")
    except OSError as error:
        raise UserError(f"{clone} is no clone of clothing-dataset: {error}") from error
    seen = {row["image"]: row["class"] for row in read_table(SEEN)}
    rows = [row for row in rows if class_of(row, seen)]
    paths = [clone / "images" / f"{row['image']}.jpg" for row in rows]
    images = thread_map(image_of, paths, max_workers=os.cpu_count(), desc="reading")
    found = [(image, row) for image, row in zip(images, rows, strict=True) if image is not None]
    if not found:
        raise UserError(f"{clone} has none of its pictures: clone it anew")
    labels = [CLASS_NAMES.index(class_of(row, seen)) for _, row in found]
    held_out = [int(row["sender_id"]) % 6 == HELD_OUT for _, row in found]
    return np.stack([image for image, _ in found]), np.uint8(labels), np.array(held_out)


def write_split(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images, uint8 (N, 28, 28), and labels, uint8 (N,), as files like MNIST's."""
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
        with whole_file(folder / f"{split}-{kind}-ubyte") as file:
            file.write(header + values.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("clone", type=user_path, help="of github.com/alexeygrigorev/clothing-dataset")
    add("--data-dir", type=user_path, default=Path("data"), help="folder of Fashion-MNIST")
    add("--output-dir", type=user_path, default=Path("data/photographs"), help="folder to write")
    args = parser.parse_args()
    with errors_in_one_line("photographs"):
        others, other_labels = dataset.load(args.data_dir, train=True)
        chosen = dataset.split_indices(other_labels, MIXED_IN, seed=0)[1]
        images, labels, held_out = read_photographs(args.clone)
        train = np.flatnonzero(~held_out).repeat(REPEAT)
        mixed = np.concatenate([others[chosen, 0], images[train]])
        mixed_labels = np.concatenate([np.uint8(other_labels[chosen]), labels[train]])
        write_split(args.output_dir, "train", mixed, mixed_labels)
        write_split(args.output_dir, "t10k", images[held_out], labels[held_out])
        with whole_file(args.output_dir / CLASS_LIST) as file:
            file.write("\n".join(CLASS_NAMES).encode())
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    print(", ".join(f"{name} {n:,}" for name, n in zip(CLASS_NAMES, counts, strict=True)))
    print(f"wrote {args.output_dir}, {held_out.sum():,} of {len(labels):,} held out")


if __name__ == "__main__":
    main()
