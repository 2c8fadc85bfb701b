"""What attribute() says of data that it cannot use: the example by its position, whichever method reads it."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning import BinaryClassification, Classification, attribute, further_train, retrain
from tests.helpers.models import binary_data, classification_data

DATA, QUERIES = classification_data(40), classification_data(5, seed=1)
SGD = partial(torch.optim.SGD, lr=0.1)


def scores(queries, data, method, num_outputs=3, **options):
    model = nn.Linear(4, num_outputs)
    return attribute(model, queries, train_data=data, method=method, batch_size=8, show_progress=False, **options)


def retrained(queries, data, task=None):
    options = {"max_epochs": 1, "batch_size": 8, "optimizer": SGD, "num_subsets": 4, "task": task}
    return retrain(lambda: nn.Linear(4, 3), queries, train_data=data, show_progress=False, **options)


def trained_on(queries, data, task=None):
    options = {"batch_size": 8, "optimizer": SGD, "task": task, "show_progress": False}
    return further_train(nn.Linear(4, 3), queries, train_data=data, **options)


WAYS = {
    "stride": partial(scores, method="stride"),
    "learned": partial(scores, method="stride", basis="learned", rank=2),
    "grad-dot": partial(scores, method="grad-dot"),
    "influence-cg": partial(scores, method="influence-cg"),
    "retrain": retrained,
    "further_train": trained_on,
}
pytestmark = pytest.mark.usefixtures("few_steps")
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def changed(data, position, value=None, label=None):
    x, y = (tensor.clone() for tensor in data.tensors)
    if value is not None:
        x[position, 1] = value
    if label is not None:
        y[position] = label
    return TensorDataset(x, y)


@every_way
@pytest.mark.parametrize("task", [None, Classification()], ids=["inferred", "given"])
def test_labels_out_of_range_are_named(way, task):
    for label, said in ((7, "7, and a model with 3 outputs takes 0..2"), (-100, "-100, and a")):
        with pytest.raises(ValueError, match=f"^Query 3 has the target {said}"):
            way(changed(QUERIES, 3, label=label), DATA, task=task)
        with pytest.raises(ValueError, match=rf"^Training example 3[79] has the target {said}.* Likewise 3[79]\.$"):
            way(QUERIES, changed(changed(DATA, 37, label=label), 39, label=label), task=task)


@pytest.mark.parametrize("label", [7, -100])
def test_labels_out_of_range_in_the_first_batch_are_named(label):
    with pytest.raises(ValueError, match=f"^Training example 2 has the target {label}"):
        scores(QUERIES, changed(DATA, 2, label=label), "stride")


@pytest.mark.parametrize("method", ["stride", "grad-dot"])
def test_binary_labels_out_of_range_are_named(method):
    data = binary_data(40)
    with pytest.raises(ValueError, match=r"^Training example 37 has the target 2, and a binary target must be 0 or 1"):
        scores(binary_data(5), changed(data, 37, label=2), method, num_outputs=1, task=BinaryClassification())


@every_way
def test_queries_that_are_not_finite_are_named_as_queries(way):
    with pytest.raises(ValueError, match=r"^Query 1 has NaN in its"):
        way(changed(QUERIES, 1, value=torch.nan), DATA)


@pytest.mark.parametrize("method", ["stride", "grad-dot"])
def test_training_examples_that_are_asked_about_are_queries(method):
    """The examples that an attribution holds may be given as queries again."""
    first = scores(QUERIES, DATA, method)
    first.train_data.dataset = changed(DATA, 1, value=torch.nan)
    with pytest.raises(ValueError, match=r"^Query 1 has NaN in its"):
        scores(first.train_data, DATA, method)
