"""Indexes of training examples give the same ranking, and the same nats, as scores of all pairs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from stride_lightning.information.attributor import InformationGainAttributor, InformationLossAttributor
from stride_lightning.information.index.checks import VectorIndexError
from stride_lightning.information.index.on_disk import InformationIndex
from stride_lightning.information.index.retrieval import build_index, search_index
from stride_lightning.information.loss import information
from tests.helpers.models import Classifier, build, classification_data
from tests.information.cases import rows_of

NUM_TRAIN = 40


def fitted(kind=InformationLossAttributor, data=None, model=None, **options):
    model = build(Classifier) if model is None else model
    options = {"likelihood": "margin", "ridge": 0.3, "show_progress": False, **options}
    return kind(**options).fit(model, classification_data(NUM_TRAIN) if data is None else data)


def queries():
    return classification_data(6, seed=1)


@pytest.mark.parametrize("kind", [InformationLossAttributor, InformationGainAttributor])
@pytest.mark.parametrize("on_disk", [False, True])
def test_the_ranking_and_the_nats_of_all_pairs(kind, on_disk, tmp_path):
    if on_disk:
        pytest.importorskip("lancedb")
    attributor = fitted(kind)
    index = build_index(attributor, tmp_path if on_disk else None)
    retrieved = search_index(attributor, index, queries(), k=7)
    best = attributor.attribute(queries()).top(7)
    assert torch.equal(retrieved.positions, best.proponents)
    torch.testing.assert_close(retrieved.nats.float(), best.proponent_scores, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("on_disk", [False, True])
def test_one_more_copy(on_disk, tmp_path):
    if on_disk:
        pytest.importorskip("lancedb")
    attributor = fitted()
    index = build_index(attributor, tmp_path if on_disk else None, form="copy")
    retrieved = search_index(attributor, index, queries(), k=5)
    rows = rows_of(attributor, queries())
    expected = information(*rows, attributor.posterior, "copy").sort(descending=True, stable=True)
    assert torch.equal(retrieved.positions, expected.indices[:, :5])
    torch.testing.assert_close(retrieved.nats.float(), expected.values[:, :5], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("on_disk", [False, True])
def test_your_own_columns_and_filters(on_disk, tmp_path):
    if on_disk:
        pytest.importorskip("lancedb")
    attributor = fitted()
    names = [f"document {i % 3}" for i in range(NUM_TRAIN)]
    columns = {"document": names, "place": list(range(NUM_TRAIN))}
    index = build_index(attributor, tmp_path if on_disk else None, columns=columns)
    retrieved = search_index(attributor, index, queries(), k=4, where=lambda columns: columns["place"] < 20)
    assert (retrieved.positions < 20).all()
    assert retrieved.columns["document"] == [[names[i] for i in row] for row in retrieved.positions.tolist()]
    index = build_index(attributor, columns={"label": torch.arange(NUM_TRAIN) % 3, "weight": np.ones(NUM_TRAIN)})
    assert index.columns == {"label": int, "weight": float}


def test_what_cannot_be_built():
    attributor = fitted()
    with pytest.raises(ValueError, match=r"Expected 40 values per column.*'label': 3"):
        build_index(attributor, columns={"label": [1, 2, 3]})
    with pytest.raises(TypeError, match="values of one type"):
        build_index(attributor, columns={"label": [1] * 39 + ["one"]})
    with pytest.raises(ValueError, match=r"3 outputs.*likelihood='margin'"):
        build_index(fitted(likelihood="gauss-newton"))
    with pytest.raises(RuntimeError, match=r"fit\(model, train_data\) before build_index"):
        build_index(InformationGainAttributor(likelihood="margin"))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (nn.Linear(3, 3), "an object of type Linear"),
        (InformationGainAttributor, "the class InformationGainAttributor"),
        (None, "an object of type NoneType"),
    ],
    ids=["model", "class", "none"],
)
def test_other_objects_are_refused_by_type(value, kind):
    message = f"expects a fitted information attributor as its first argument, got {kind}. Make one with Information"
    with pytest.raises(TypeError, match=rf"build_index\(\) {message}"):
        build_index(value)
    with pytest.raises(TypeError, match=rf"search_index\(\) {message}"):
        search_index(value, None, queries())


def test_arguments_of_other_types_are_refused_by_name():
    attributor = fitted()
    with pytest.raises(
        TypeError, match=r"search_index\(\) expects an index as its second .* type TensorDataset\. Make one"
    ):
        search_index(attributor, queries(), queries())
    with pytest.raises(
        TypeError, match=r"`columns` must be a dict from names to one value .*, got list\. Pass for example"
    ):
        build_index(attributor, columns=["web"] * NUM_TRAIN)
    with pytest.raises(TypeError, match="`where` must be a function of the columns"):
        search_index(attributor, build_index(attributor), queries(), where="place < 20")


@pytest.fixture
def growing():
    """A model, its data, and an attributor of the first of them."""
    pytest.importorskip("lancedb")
    model, data = build(Classifier), classification_data(NUM_TRAIN)
    return model, data, fitted(InformationGainAttributor, Subset(data, range(25)), model)


def test_growing_data_are_added_to_an_index_of_gains(growing, tmp_path):
    model, data, first = growing
    assert len(build_index(first, tmp_path)) == 25
    whole = fitted(InformationGainAttributor, data, model)
    grown = build_index(whole, tmp_path)
    assert len(grown) == NUM_TRAIN
    assert torch.equal(
        search_index(whole, grown, queries(), k=9).positions,
        search_index(whole, build_index(whole), queries(), k=9).positions,
    )
    assert len(InformationIndex.open(tmp_path)) == NUM_TRAIN


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"ridge": 0.5}, r"'ridge': expected 0\.5, got 0\.3"),
        ({"seed": 1}, "'seed'"),
        ({"model": Classifier(width=9)}, "'weights'"),
        ({"data": classification_data(NUM_TRAIN, seed=5)}, "'data'"),
    ],
)
def test_an_index_of_something_else_is_refused(other, message):
    with pytest.raises(VectorIndexError, match=message):
        search_index(fitted(**other), build_index(fitted()), queries())


def test_a_gain_index_of_other_data_is_refused(growing, tmp_path):
    model, data, first = growing
    index = build_index(first, tmp_path)
    others = [Subset(data, range(10, 35)), Subset(data, range(20)), classification_data(NUM_TRAIN, seed=3)]
    for other in others:
        attributor = fitted(InformationGainAttributor, other, model)
        with pytest.raises(VectorIndexError, match="'data'"):
            build_index(attributor, tmp_path)
        with pytest.raises(VectorIndexError, match="'data'"):
            search_index(attributor, index, queries())


def test_positions_of_a_part_of_the_data():
    attributor = fitted()
    attributor.fit(build(Classifier), classification_data(NUM_TRAIN), train_indices=[30, 3, 8, 21])
    retrieved = search_index(attributor, build_index(attributor), queries(), k=4)
    assert torch.equal(retrieved.positions.sort().values, torch.tensor([3, 8, 21, 30]).expand(6, 4))


def test_a_regression_has_one_output():
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    attributor = InformationLossAttributor(ridge=1.0, show_progress=False)
    attributor.fit(nn.Linear(3, 1), TensorDataset(x, x.sum(1)))
    assert search_index(attributor, build_index(attributor), TensorDataset(x[:2], x[:2].sum(1)), k=3).nats.min() >= 0
