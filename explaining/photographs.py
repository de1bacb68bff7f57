"""Real photographs to train on, from the clothing dataset of Alexey Grigorev and others (CC0).

    git clone --depth 1 https://github.com/alexeygrigorev/clothing-dataset
    python -m explaining.photographs clothing-dataset

writes data/photographs.npz: what `--image` makes of them, their classes, and which to hold out.
"""

import argparse
import csv
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import UserError, errors_in_one_line, user_path, whole_file
from dataset import CLASS_NAMES
from explaining.photo import image_of

CLASSES = dict(Pants="Trouser", Dress="Dress", Shirt="Shirt", Outwear="Coat")
CLASSES |= {"Blazer": "Coat", "T-Shirt": "T-shirt/top", "Longsleeve": "Pullover"}
# Contributors of the `test` folder of clothing-dataset-small, which is never trained on.
TEST_SENDERS = {46, 204, 227, 309, 310}
HELD_OUT = 3  # the contributors whose number leaves 3 if it is divided by 6
# The class of shoes, and mistakes of the table, which have none; seen by eye. Pumps and formal
# shoes are left out. Names are cut to six digits.
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


def read_photographs(clone: Path) -> dict[str, np.ndarray]:
    """The photographs of a clone that have a class; those that cannot be read are left out.

    Returns `images`, uint8 (N, 28, 28), `labels`, uint8 (N,), and `held_out`, bool (N,): no
    contributor has photographs on both sides.
    """
    try:
        rows = read_table(clone / "images.csv")
    except OSError as error:
        raise UserError(f"{clone} is no clone of clothing-dataset: {error}") from error
    seen = {row["image"]: row["class"] for row in read_table(SEEN)}
    rows = [row for row in rows if class_of(row, seen)]
    paths = [clone / "images" / f"{row['image']}.jpg" for row in rows]
    images, labels, held_out = [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = tqdm(pool.map(image_of, paths), "reading", len(paths))
        for row, image in zip(rows, read, strict=True):
            if image is None:
                continue
            images.append(image)
            labels.append(CLASS_NAMES.index(class_of(row, seen)))
            held_out.append(int(row["sender_id"]) % 6 == HELD_OUT)
    if not images:
        raise UserError(f"{clone} has none of its pictures: clone it anew")
    return dict(images=np.stack(images), labels=np.uint8(labels), held_out=np.array(held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("clone", type=user_path, help="of github.com/alexeygrigorev/clothing-dataset")
    add("--output", type=user_path, default=Path("data/photographs.npz"), help="file to write")
    args = parser.parse_args()
    with errors_in_one_line("photographs"):
        archive = read_photographs(args.clone)
        with whole_file(args.output) as file:
            np.savez_compressed(file, **archive)
    counts = np.bincount(archive["labels"], minlength=len(CLASS_NAMES))
    print(", ".join(f"{name} {n:,}" for name, n in zip(CLASS_NAMES, counts, strict=True)))
    print(f"wrote {args.output}, {archive['held_out'].sum():,} of {counts.sum():,} held out")


if __name__ == "__main__":
    main()
