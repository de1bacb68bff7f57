"""Real photographs to train on, from the clothing dataset of Alexey Grigorev and others (CC0).

    git clone --depth 1 https://github.com/alexeygrigorev/clothing-dataset
    python -m explaining.photographs clothing-dataset

writes data/photographs.npz: what `--image` makes of them, their classes, and which to hold out.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import UserError, errors_in_one_line, user_path, whole_file
from dataset import CLASS_NAMES
from explaining.photo import read_image

CLASSES = dict(Pants="Trouser", Dress="Dress", Shirt="Shirt", Outwear="Coat")
CLASSES |= {"Blazer": "Coat", "T-Shirt": "T-shirt/top", "Longsleeve": "Pullover"}
# Contributors of the `test` folder of clothing-dataset-small, which is never trained on.
TEST_SENDERS = {46, 204, 227, 309, 310}
HELD_OUT = 3  # the contributors whose number leaves 3 if it is divided by 6
# Sorted by eye: the first six digits of the names. Pumps and formal shoes are left out.
SHOES = {
    "Sneaker": """
        0bacb2 10ca39 158391 17f835 189a94 1ece38 22d0ec 240baf 245352 30021b 38bec7 3c4df2 41302a
        43b4bd 454fd5 49d3d0 4cb476 4eba04 50f6bd 523ba9 552bd3 56a458 578688 5bb088 619036 70d6fd
        75912d 75b7e8 765235 76bf80 7bb022 87a3d4 88d7e8 8c2759 8f945c 9016f2 9a7ca4 9b68ea 9f922e
        9ff586 a3c977 ade4c3 bf583c bf7852 cadf29 cedf74 d09be0 d10acc d20847 d4e28f d68db0 d748ed
        dc0d9b de8537 e3f226 e92b0f f5dbed f7b209 fb0e40 fbdddc fe1772
    """,
    "Sandal": """
        04fa06 082153 0a30ba 0fd660 17e48b 1e3ce1 30b6fd 33a072 3cf61c 3ebf66 51e600 530c78 6048d8
        68477f 6ce157 75557d 766497 78c51d 7d0a2e 8232d8 82fd12 8b6de4 927451 929c80 94484a 9e27ae
        a28a79 a3e5af abea33 b00f4c b076b1 b2d23f b34268 bcc238 c8582c c96187 d92184 d9cf6f d9d945
        db5aab e0b088 e2dfcb e78742 e9c409 ea4afd eb1677 ee368b f744c1 f8a7ab f9712e
    """,
    "Ankle boot": """
        1558e0 206b65 253dc2 261b36 2fb686 30feae 38cf32 3b86d8 3ddf90 49d3b2 598fb3 5e577f 5fea04
        76acd4 778b03 7d5a20 84cfca 9c97e5 a7b367 ac8a9f b2d007 b35868 c1480b c224d3 ca045c d03275
        e4426e e454ba f56feb f5bb1e f72b67 fa5fe1 feb9c0
    """,
}
# Other mistakes of the table, seen by eye.
SKIPPED = """
    025b65 053354 05a5ad 1b499e 1e48d3 20e5a1 283f8e 29ac11 2bd016 349cf3 399480 428ce1 484aaf
    509f95 5103e7 5b0b2f 643ca1 6bedb1 7481e6 7965e4 7aefbf 7da3a0 7e3b81 809a08 826b10 8d0d37
    95b40e 95cebb a36dc7 a8c866 b79033 b8ffc6 bc6aaa c56e9f d251cc d451d0 da9a24 db21e8 e6b7c7
    e86531 f799a6 f92d0f
""".split()


def class_of(row: dict[str, str]) -> str | None:
    """The class of a row of images.csv; None if it has none of ours, or is not to train on."""
    code = row["image"][:6]
    if row["kids"] == "True" or int(row["sender_id"]) in TEST_SENDERS or code in SKIPPED:
        return None
    if row["label"] == "Shoes":
        return next((name for name, codes in SHOES.items() if code in codes.split()), None)
    return CLASSES.get(row["label"])


def read_photographs(clone: Path) -> dict[str, np.ndarray]:
    """The photographs of a clone that have a class.

    Returns `images`, uint8 (N, 28, 28), `labels`, uint8 (N,), and `held_out`, bool (N,): no
    contributor has photographs on both sides.
    """
    try:
        with open(clone / "images.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if class_of(row)]
    except OSError as error:
        raise UserError(f"{clone} is no clone of clothing-dataset: {error}") from error
    images = []
    for row in tqdm(rows):
        path = clone / "images" / f"{row['image']}.jpg"
        try:
            images.append(read_image(path)[0])
        except UserError as error:
            raise UserError(f"{path} {error}") from error
    return dict(
        images=np.stack(images),
        labels=np.uint8([CLASS_NAMES.index(class_of(row)) for row in rows]),
        held_out=np.array([int(row["sender_id"]) % 6 == HELD_OUT for row in rows]),
    )


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
    print(f"{'':12} {'to train on':>11}  held out")
    counts = Counter(zip(archive["labels"].tolist(), archive["held_out"].tolist(), strict=True))
    for label, name in enumerate(CLASS_NAMES):
        print(f"{name:12} {counts[label, False]:11,}  {counts[label, True]:8,}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
