"""Are training images that are known to have wrong labels among those of `--label-errors`?

    python benchmarks/label_errors.py    trains five models of the fast recipe: 10 minutes

Each is asked about a fifth of the training images, whose labels it has not seen. Those whose label
it and most of the three nearest images contradict are ranked by its confidence. The control asks
the models alone.
"""

import argparse
from collections.abc import Iterator

import results
import torch
from sklearn.model_selection import StratifiedKFold

import dataset
import train
from explaining.features import TrainingImages, embed, labels_of_nearest

# Images of the paper's authors (Mueller & Markert 2019, arXiv 1912.05283) in
# https://github.com/zalandoresearch/fashion-mnist/issues/166 and their repository; they found 64.
KNOWN = (16691, 22264, 28264, 33982, 40513, 42018, 45592)
FIRST = 300
COLUMNS = dict(
    ranked_by=("contradicted by", ""),
    images=("images", ",.0f"),
    known=("known errors among them", ""),
    known_among_first=(f"among the first {FIRST}", ""),
    ranks=("their ranks", ""),
)


def fold(data_dir: str, number: int, folds: list) -> dict[str, torch.Tensor]:
    """Train without a fold; return its wrong answers, and whether similar images agree."""
    config = results.settings("fast", seed=number, data_dir=data_dir)
    run = train.start_run(config)
    run.train_index, held_out = map(torch.from_numpy, folds[number])
    run.plan_steps()
    for epoch in range(config.epochs):
        train.train_epoch(run, epoch)
    model, images, labels = run.ema.eval(), run.originals, run.labels
    tokens = embed(model, images[held_out])
    confidence, answers = model.head(tokens).detach().softmax(dim=1).max(dim=1)
    wrong = answers != labels[held_out]
    known = embed(model, images[run.train_index])
    training = TrainingImages(images, labels, run.train_index, held_out, known)
    agrees = labels_of_nearest(tokens[wrong], training) == answers[wrong]
    return dict(index=held_out[wrong], confidence=confidence[wrong], agrees=agrees)


def ranking(name: str, index: torch.Tensor, confidence: torch.Tensor) -> results.Row:
    """Where the known errors are among images (N,), the most confident first."""
    order = index[confidence.argsort(descending=True, stable=True)].tolist()
    ranks = sorted(order.index(image) + 1 for image in KNOWN if image in order)
    among_first = sum(rank <= FIRST for rank in ranks)
    found = dict(known=len(ranks), known_among_first=among_first, ranks=" ".join(map(str, ranks)))
    return dict(ranked_by=name, images=len(order)) | found


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    """A row with the nearest images' labels, and one without."""
    labels = dataset.load(args.data_dir, train=True)[1]
    cut = StratifiedKFold(5, shuffle=True, random_state=0)
    folds = list(cut.split(labels, labels))
    parts = [fold(args.data_dir, number, folds) for number in range(5)]
    index, confidence, agrees = (torch.cat([p[name] for p in parts]) for name in parts[0])
    yield ranking("the model and similar images", index[agrees], confidence[agrees])
    yield ranking("the model", index, confidence)


def main() -> None:
    results.run(results.make_parser(__file__, __doc__), measure, ("ranked_by",), COLUMNS)


if __name__ == "__main__":
    main()
