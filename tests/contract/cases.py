"""A tiny model and data for each kind of task, and the options that some methods cannot do without.

A new method is under contract once it is among the methods. It needs a line here only if its defaults are not enough,
or if it cannot do what is asked of all others.
"""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from stride_lightning import GroundTruth, methods, retrain
from stride_lightning.attribute import class_of, create
from tests.helpers import models
from tests.helpers.gradient_models import Everything
from tests.helpers.models import build
from tests.helpers.texts import LanguageModule, Texts, padded

NUM_TRAIN, NUM_QUERIES = 14, 5
#: The first query stands among the training examples: here with its label, there with another.
COPY, CONTRADICTION = 3, 8
QUIET = {"show_progress": False}


@dataclass(frozen=True)
class Case:
    """A kind of model, its training data and its queries."""

    make: type
    train: Dataset
    queries: Dataset


class Mixed(models.Tiny):
    """Dropout, BatchNorm and an activation in place; frozen in part."""

    def __init__(self):
        super().__init__(Everything())


class TextModule(LanguageModule):
    """Its loss is the mean over texts, in which each has a share."""

    def training_step(self, batch, batch_idx):
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(self(batch["input_ids"])[:, :-1].mT, labels, reduction="none")
        return (losses.sum(1) / (labels >= 0).sum(1)).mean()


class TextsWithCopies(Texts):
    """Texts of which one is a copy of a query, and one ends it with another token."""

    def __init__(self, num, query):
        super().__init__(num)
        self.query = query

    def __getitem__(self, index):
        if index not in (COPY, CONTRADICTION):
            return super().__getitem__(index)
        ids, labels = (self.query[name].clone() for name in ("input_ids", "labels"))
        if index == CONTRADICTION:
            ids[-1] = labels[-1] = 7 - ids[-1]
        return {"input_ids": ids, "labels": labels}


def _points(make, make_data, contradict):
    (x, y), queries = (tensor.clone() for tensor in make_data(NUM_TRAIN).tensors), make_data(NUM_QUERIES, seed=1)
    query, target = queries[0]
    x[[COPY, CONTRADICTION]] = query
    y[COPY], y[CONTRADICTION] = target, contradict(query, target)
    return Case(make, TensorDataset(x, y), queries)


@torch.no_grad()
def _beyond(query, target):
    """A target on the other side of the model's answer."""
    return target + 4 * (build(models.Regressor)(query[None])[0] - target).sign()


_TEXTS = Texts(NUM_QUERIES, seed=1)
CASES = {
    "classification": _points(models.Classifier, models.classification_data, lambda query, target: (target + 1) % 3),
    "binary": _points(models.BinaryClassifier, models.binary_data, lambda query, target: 1 - target),
    "regression": _points(models.Regressor, models.regression_data, _beyond),
    "language": Case(TextModule, TextsWithCopies(NUM_TRAIN, _TEXTS[0]), _TEXTS),
}
CASES["mixed"] = Case(Mixed, CASES["classification"].train, CASES["classification"].queries)


def examples(dataset, positions=None):
    """All or some examples of a data set, in an order, as methods take them."""
    chosen = dataset if positions is None else Subset(dataset, list(positions))
    return DataLoader(chosen, NUM_TRAIN, collate_fn=padded) if isinstance(dataset[0], dict) else chosen


#: Methods with options that make them go another way: under contract as if they were methods of their own.
VARIANTS = {
    "information-loss, signed": ("information-loss", {"signed": True, "projection_dim": 9}),
    "information-gain, margin": ("information-gain", {"likelihood": "margin"}),
    "logra, projected": ("logra", {"projection_dim": 2}),
    "trak, projected": ("trak", {"projection_dim": 7}),
    "ekfac, readout residuals": ("ekfac", {"residuals": "readout"}),
    "influence-cg, readout residuals": (
        "influence-cg",
        {"residuals": "readout", "damping": 0.3, "tolerance": 1e-7},
    ),
    "trak-newton, readout residuals": ("trak-newton", {"residuals": "readout"}),
}
#: Those of the package: tests of others may have entered theirs.
METHODS = [name for name in methods() if class_of(name).__module__.startswith("stride_lightning.")] + [*VARIANTS]


def _truth(kind, columns, rows):
    """Losses of the queries after retraining on subsets, without fingerprints of any data."""
    truth = _retrained(kind)
    return {"truth": GroundTruth(truth.masks[:, columns], truth.losses_by_seed[:, :, rows], truth.seeds)}


@cache
def _retrained(kind):
    case = CASES["classification" if kind == "mixed" else kind]  # BatchNorm would be trained one model by one
    queries = examples(ConcatDataset([case.queries, case.train]))
    options = {"max_epochs": 8, "num_subsets": 60, "num_seeds": 1, "batch_size": NUM_TRAIN}
    return retrain(partial(build, case.make), queries, train_data=examples(case.train), **options, **QUIET)


@cache
def _checkpoints(kind):
    """A folder of two checkpoints with learning rates, as training leaves them."""
    folder = Path(mkdtemp())
    for step, rate in enumerate((0.3, 0.1)):
        model = build(CASES[kind].make, seed=step)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
        states = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
        torch.save({**states, "global_step": step}, folder / f"{step}.ckpt")
    return folder


#: What a method cannot run without, or what makes it exact, so that a tolerance hides no mistake.
OPTIONS = {
    "further-training": {"num_seeds": 1, "train_batch_size": NUM_TRAIN},
    "influence-cg": {"damping": 0.3, "tolerance": 1e-7},
    "influence-lissa": {"damping": 50.0, "depth": 5},
    "last-layer": {"damping": 0.3, "tolerance": 1e-7},
    "retraining": {"recovery": "ridge", "penalty": 0.1},
    "tracin": {},
}
#: The same, made for a kind of task and for the columns and rows of the scores.
MADE = {"retraining": _truth, "tracin": lambda kind, columns, rows: {"checkpoints": _checkpoints(kind)}}
NO_SEQUENCES = (
    "information-gain",
    "information-gain, margin",
    "information-loss",
    "information-loss, signed",
    "ekfac, readout residuals",
    "influence-cg, readout residuals",
    "trak-newton, readout residuals",
)
#: Methods and kinds whose self-influence is the effect of leaving the whole example out, not the first order of it.
FINITE_EFFECTS = {("stride", "classification")}
#: What a method cannot do, and why.
EXEMPT = {
    ("grad-cos", "self-influence"): "the cosine of an example with itself is 1, and refused",
    **dict.fromkeys(((method, "language") for method in NO_SEQUENCES), "it refuses sequences"),
    ("information-gain, margin", "regression"): "a regression has no margin",
    ("further-training", "not finite"): "it names the query whose loss is not finite",
    ("further-training", "runs the model"): "it runs copies",
    ("retraining", "runs the model"): "it runs none where the truth is given",
    ("retraining", "not finite"): "it runs no model where the truth is given",
    ("retraining", "predicted"): "it measures losses of labelled queries",
    ("retraining", "asked again"): "its truth is one of certain queries",
}


def made(method, kind, columns=range(NUM_TRAIN), rows=range(NUM_QUERIES), **options):
    """An attributor with the options of its entry, for these columns and rows of the scores.

    Rows from ``NUM_QUERIES`` on are training examples.
    """
    name, needed = VARIANTS.get(method, (method, OPTIONS.get(method, {})))
    if method in MADE:
        needed = needed | MADE[method](kind, list(columns), list(rows))
    return create(name, **QUIET | {"batch_size": 2 * NUM_TRAIN} | needed | options)


def model_of(kind):
    """In double precision, so that no tolerance hides a mistake."""
    return build(CASES[kind].make).double()


def fitted(method, kind, columns=range(NUM_TRAIN), rows=range(NUM_QUERIES), model=None, **options):
    """The same after its fit to these training examples."""
    attributor, train = made(method, kind, columns, rows, **options), examples(CASES[kind].train)
    return attributor.fit(model_of(kind) if model is None else model, train, train_indices=list(columns))


def queries_of(kind, rows=range(NUM_QUERIES)):
    """The queries, or training examples, of these rows."""
    return examples(ConcatDataset([CASES[kind].queries, CASES[kind].train]), rows)


def scored(method, kind, columns=range(NUM_TRAIN), rows=range(NUM_QUERIES), **options):
    """The attribution of these queries to these training examples."""
    return fitted(method, kind, columns, rows, **options).attribute(queries_of(kind, rows))
