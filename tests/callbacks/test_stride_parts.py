"""From the callback to attribution: each part of a record is read, and said to be missing where it is."""

import pytest
import torch
from torch.utils.data import DataLoader

from stride_lightning import StrideCallback, attribute
from stride_lightning.steering.subsets import sample_design
from stride_lightning.storage.records import read_record, write_record
from tests.helpers.models import (
    NUM_TRAIN,
    BinaryClassifier,
    Classifier,
    ConvNet,
    Regressor,
    binary_data,
    build,
    classification_data,
    make_trainer,
    picture_data,
    regression_data,
    train,
)
from tests.helpers.texts import LanguageModule, Texts, padded

DATA, QUERIES = classification_data(), classification_data(5, seed=1)
PARTS = {
    "design": "it has no design, so",
    "statistics": "it has no scales of features, so",
    "readout": "it has no readout, so",
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A finished run as in the README, but for operators and a seed of its own: model and record."""
    folder = tmp_path_factory.mktemp("run")
    model, callback = build(Classifier), StrideCallback(fit_operators=True, seed=5)
    train(model, DATA, folder, callback)
    return model, read_record(callback.records[-1])


def rewritten(record, folder, without=(), **changed):
    """The record with groups left out or changed."""
    groups = {name: record.tensors(name) for name in record.groups if name not in without}
    info = {name: value for name, value in record.info.items() if name not in ("schema", "written")}
    return write_record(folder, record.path.name, info, groups | changed)


def ask(model, record=None, **options):
    return attribute(
        model, QUERIES, train_data=DATA, record=record, show_progress=False, **{"recovery": "prior", **options}
    )


def same(one, other, tolerance=1e-3):
    largest = other.scores.abs().max().item()
    torch.testing.assert_close(one.scores, other.scores, rtol=tolerance, atol=tolerance * largest)


def test_the_first_example_of_the_readme_reads_every_part(tmp_path):
    """By default the scales and the readout; with operators the design too."""
    model, callback = build(Classifier), StrideCallback(seed=5)
    train(model, DATA, tmp_path, callback)
    by_default = attribute(model, QUERIES, train_data=DATA, show_progress=False).metadata
    assert by_default["record"] == str(callback.records[-1])
    assert by_default["readout"]["scales_from_record"] is by_default["readout"]["from_record"] is True
    assert by_default["design"] is by_default["operators"] is None  # in closed form there are none
    attribution = ask(model)
    metadata = attribution.metadata
    assert metadata["record"] == str(callback.records[-1])
    assert metadata["record_note"].endswith("which has these weights")
    assert metadata["design"] == {"num_subsets": 16, "num_train": NUM_TRAIN, "degree": 8, "seed": 5}
    assert metadata["readout"]["scales_from_record"] is metadata["readout"]["from_record"] is True
    assert metadata["operators"] == {"num_subsets": 16, "from_record": False}  # they are on demand
    model.trainer = None
    fresh = ask(model, seed=5)
    assert fresh.metadata["record"] is None
    same(attribution, fresh)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Classifier, classification_data),
        (ConvNet, picture_data),
        (Regressor, regression_data),
        (BinaryClassifier, binary_data),
    ],
)
def test_a_record_changes_no_score(tmp_path, kind, data):
    model, queries = build(kind), data(5, seed=1)
    train(model, data(), tmp_path, StrideCallback(fit_operators=True))
    arguments = {"train_data": data(), "recovery": "prior", "show_progress": False}
    reused = attribute(model, queries, **arguments)
    assert reused.metadata["operators"]["from_record"]
    assert reused.metadata["readout"]["from_record"]
    model.trainer = None
    fresh = attribute(model, queries, **arguments)
    assert fresh.metadata["record"] is None
    assert not fresh.metadata["readout"]["from_record"]
    same(reused, fresh)
    torch.testing.assert_close(reused.std, fresh.std, rtol=1e-2, atol=1e-3 * fresh.std.max().item())


@pytest.mark.parametrize("part", [*PARTS, "operators"])
def test_a_part_that_is_missing_is_computed_and_named(recorded, tmp_path, part):
    model, record = recorded
    whole, partial = ask(model, record.path), ask(model, rewritten(record, tmp_path, {part}))
    note, readout = partial.metadata["record_note"], partial.metadata["readout"]
    assert "it has no" not in whole.metadata["record_note"]
    assert ("it has no" in note) == (part in PARTS)
    assert PARTS.get(part, "") in note
    assert readout["scales_from_record"] == (part != "statistics")
    assert readout["from_record"] == (part != "readout")
    assert whole.metadata["operators"]["from_record"]
    assert partial.metadata["operators"]["from_record"] == (part not in ("design", "operators"))
    if part == "design":
        assert partial.metadata["design"]["seed"] == 0
        assert not torch.allclose(partial.scores, whole.scores, rtol=1e-3)
    else:
        same(partial, whole)


def test_all_parts_missing(recorded, tmp_path):
    model, record = recorded
    partial = ask(model, rewritten(record, tmp_path, {*PARTS, "operators"}), seed=5)
    assert "it has no design and no scales of features and no readout, so that was" in partial.metadata["record_note"]
    same(partial, ask(model, record.path))


def test_every_part_is_read(recorded, tmp_path):
    """With another part, other scores; but another readout is only a start."""
    model, record = recorded
    expected = ask(model, record.path)
    scales = record.tensors("statistics")["scales"]
    operators = record.tensors("operators")["coefficients"]
    coefficients = record.tensors("readout")["coefficients"]
    changes = {
        "design": sample_design(NUM_TRAIN, 16, seed=9).tensors(),
        "statistics": {"scales": scales * torch.tensor([3.0, 0.5])},
        "operators": {"coefficients": operators.flip(2)},
    }
    for number, (name, tensors) in enumerate(changes.items()):
        changed = ask(model, rewritten(record, tmp_path / str(number), **{name: tensors}))
        assert not torch.allclose(changed.scores, expected.scores, rtol=1e-2), name
    far = {"coefficients": coefficients + 5 * torch.randn_like(coefficients)}
    started = ask(model, rewritten(record, tmp_path / "far", readout=far))
    assert started.metadata["readout"]["from_record"]
    same(started, expected)


def test_a_readout_of_other_features_is_refit(recorded, tmp_path):
    model, record = recorded
    parts = {name: {"coefficients": record.tensors(name)["coefficients"][1:]} for name in ("readout", "operators")}
    metadata = ask(model, rewritten(record, tmp_path, **parts)).metadata
    assert not metadata["readout"]["from_record"]
    assert not metadata["operators"]["from_record"]


@pytest.mark.parametrize(
    ("made_with", "asked_for", "num_subsets", "is_read"),
    [
        ({"num_subsets": 8}, {}, 8, True),
        ({"num_subsets": 40, "degree": 10}, {}, 40, True),
        ({"num_subsets": 40}, {"recovery": "ridge"}, 40, True),
        ({"num_subsets": 40}, {"recovery": "lasso", "penalty": 0.1}, 40, True),
        ({}, {"recovery": "ridge"}, 200, False),
        ({}, {"recovery": "ridge", "num_subsets": 16}, 16, True),
    ],
    ids=str,
)
def test_the_design_of_a_record_serves_where_it_is_large_enough(tmp_path, made_with, asked_for, num_subsets, is_read):
    """Sixteen subsets say too little without a prior."""
    model, callback = build(Classifier), StrideCallback(seed=5, **made_with)
    train(model, DATA, tmp_path, callback, max_epochs=1)
    metadata = ask(model, **asked_for).metadata
    assert metadata["record"] == str(callback.records[-1])
    assert metadata["design"]["num_subsets"] == num_subsets
    assert metadata["design"]["seed"] == (5 if is_read else 0)
    assert metadata["design"]["degree"] == made_with.get("degree", num_subsets // 2)


@pytest.mark.parametrize("part", ["design", "moments", "operators"])
def test_parts_of_the_record_of_texts(tmp_path, part):
    torch.manual_seed(0)
    model, callback = LanguageModule(), StrideCallback(tmp_path / "records", fit_operators=True, num_subsets=8)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)

    def loader(count, seed=0):
        return DataLoader(Texts(count, seed=seed), 5, collate_fn=padded)

    trainer.fit(model, loader(21))
    record = read_record(callback.records[-1])
    options = {"train_data": loader(21), "recovery": "prior", "num_subsets": 8, "show_progress": False}
    whole, partial = (
        attribute(model, loader(4, seed=1), record=path, **options)
        for path in (record.path, rewritten(record, tmp_path / "partial", {part}))
    )
    missing = {"design": "it has no design, so", "moments": "it has no moments of tokens, so"}
    note = partial.metadata["record_note"]
    assert "it has no" not in whole.metadata["record_note"]
    assert ("it has no" in note) == (part in missing)
    assert missing.get(part, "") in note
    assert (partial.metadata["sequences"]["seconds"]["statistics"] > 0) == (part == "moments")
    assert whole.metadata["operators"] == {"num_subsets": 8, "from_record": True}
    assert partial.metadata["operators"]["from_record"] == (part != "operators")
    same(partial, whole)
