"""Are training images that are known to have wrong labels among those of `--label-errors`?

    python benchmarks/label_errors.py    trains five models of the fast recipe: 10 minutes

Each is asked about a fifth of the training images, whose labels it has not seen. Those whose label
it and most of the three nearest images contradict are ranked by its confidence. The control asks
the models alone.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import results
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

import dataset
import train
from explaining.features import TrainingImages, embed, labels_of_nearest
from training.runs import plan_steps

# Images of the paper's authors (Mueller & Markert 2019, arXiv 1912.05283) in
# https://github.com/zalandoresearch/fashion-mnist/issues/166 and their repository; they found 64.
KNOWN = (16691, 22264, 28264, 33982, 40513, 42018, 45592)


def contradicted(
    data_dir: str, seed: int, trained: Tensor, held_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The indices (N,) of held-out images whose label a model contradicts that did not see them.

    Also returns its confidence, and whether most similar images agree with it.
    """
    config = results.settings("fast", seed=seed, data_dir=data_dir)
    steps, pruned = plan_steps(config, len(trained))
    run = replace(train.start_run(config), train_index=trained, steps=steps, pruned=pruned)
    for epoch in range(config.epochs):
        train.train_epoch(run, epoch)
    model, images, labels = run.ema.eval(), run.originals, run.labels
    tokens = embed(model, images[held_out])
    confidence, answers = model.head(tokens).detach().softmax(dim=1).max(dim=1)
    wrong = answers != labels[held_out]
    known = embed(model, images[trained])
    training = TrainingImages(images, labels, trained, held_out, known)
    agrees = labels_of_nearest(tokens[wrong], training) == answers[wrong]
    return held_out[wrong], confidence[wrong], agrees


def ranking(name: str, index: Tensor, confidence: Tensor) -> results.Row:
    """Where the known errors are among images (N,), the most confident first."""
    order = index[confidence.argsort(descending=True, stable=True)].tolist()
    ranks = sorted(order.index(image) + 1 for image in KNOWN if image in order)
    return dict(
        ranked_by=name,
        images=len(order),
        known=len(ranks),
        ranks=" ".join(map(str, ranks)),
    )


def measure(args: argparse.Namespace) -> Iterator[results.Row]:
    labels = dataset.load(args.data_dir, train=True)[1]
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(labels, labels)
    parts = []
    for seed, fold in enumerate(folds):
        parts.append(contradicted(args.data_dir, seed, *map(torch.from_numpy, fold)))
    index, confidence, agrees = map(torch.cat, zip(*parts, strict=True))
    yield ranking("the model and similar images", index[agrees], confidence[agrees])
    yield ranking("the model", index, confidence)


def main() -> None:
    results.run(results.make_parser(__file__, __doc__), measure, ("ranked_by",))


if __name__ == "__main__":
    main()
