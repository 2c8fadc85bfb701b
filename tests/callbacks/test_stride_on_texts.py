"""StrideCallback in a real fit of a language model, and what attribution makes of its record."""

import pytest
import torch
from torch.utils.data import DataLoader

from stride_lightning import CausalLanguageModeling, StrideCallback, TracInCallback, attribute
from stride_lightning.records import read_record
from tests.helpers.models import make_trainer
from tests.helpers.texts import LanguageModule, Texts, padded

TRAIN, QUERIES = Texts(21), Texts(4, seed=1)


def loader(data, shuffle=False):
    return DataLoader(data, 5, shuffle=shuffle, collate_fn=padded)


@pytest.fixture
def fitted(tmp_path):
    def fit(precision="32-true", **options):
        torch.manual_seed(0)
        callback, model = StrideCallback(tmp_path / "records", num_subsets=8, **options), LanguageModule()
        trainer = make_trainer(
            tmp_path, callback, TracInCallback(tmp_path / "tracin"), max_epochs=2, precision=precision
        )
        trainer.fit(model, loader(TRAIN, shuffle=True))
        return model, callback

    return fit


def ask(model, **options):
    return attribute(model, loader(QUERIES), train_data=loader(TRAIN), show_progress=False, **options)


def test_a_record_gives_the_scores_without_a_pass(fitted):
    model, callback = fitted()
    record = read_record(callback.records[-1])
    assert record.info["task"] == repr(CausalLanguageModeling())
    assert record.info["layers"] == [f"network.blocks.{number}" for number in range(3)] + ["network.head"]
    assert set(record.groups) == {"design", "losses", "moments", "statistics"}
    found = ask(model)
    assert found.metadata["record"] == str(callback.records[-1])
    model.trainer = None
    computed = ask(model)
    assert computed.metadata["record"] is None
    assert torch.allclose(found.scores, computed.scores, rtol=1e-4, atol=1e-7)
    losses = [
        CausalLanguageModeling().loss(model(batch["input_ids"]), CausalLanguageModeling().targets(batch))
        for batch in loader(TRAIN)
    ]
    assert torch.allclose(record.tensors("losses")["train"], torch.cat(losses).detach(), atol=1e-5)


def test_operators_are_recorded_and_used(fitted):
    model, callback = fitted(fit_operators=True)
    assert "operators" in read_record(callback.records[-1]).groups
    found = ask(model, recovery="prior")
    assert found.metadata["record"] == str(callback.records[-1])
    assert found.metadata["design"]["num_subsets"] == 8
    model.trainer = None
    computed = ask(model, recovery="prior", num_subsets=8)
    assert torch.allclose(found.scores, computed.scores, rtol=1e-3, atol=1e-6)
    assert torch.allclose(found.std, computed.std, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_mixed_precision_leaves_records_too(fitted, precision):
    model, callback = fitted(precision=precision)
    found = ask(model)
    assert found.metadata["record"] == str(callback.records[-1])
    model.trainer = None
    assert torch.allclose(found.scores, ask(model).scores, rtol=1e-3, atol=1e-6)
    exact = ask(model.float()).scores
    assert torch.corrcoef(torch.stack([found.scores.flatten(), exact.flatten()]))[0, 1] > 0.99


def test_other_data_are_refused_or_computed(fitted):
    model, callback = fitted()
    other = loader(Texts(21, seed=9))
    with pytest.raises(ValueError, match="was made with other training data"):
        attribute(model, loader(QUERIES), train_data=other, record=callback.records[-1], show_progress=False)
    found = attribute(model, loader(QUERIES), train_data=other, show_progress=False)
    assert found.metadata["record"] is None
    assert "other training data" in found.metadata["record_note"]
    with pytest.raises(ValueError, match="was made with task"):
        ask(model, task=CausalLanguageModeling("sum"), record=callback.records[-1])


def test_tracin_reads_its_checkpoints(fitted):
    model, _ = fitted()
    found = ask(model, method="tracin")
    assert len(found.metadata["checkpoints"]) == 2
    assert torch.isfinite(found.scores).all()


def test_texts_that_cannot_be_read_stop_a_fit_before_it_begins(tmp_path):
    class Broken(Texts):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item | {"input_ids": item["input_ids"] + 50} if index == 3 else item

    callback = StrideCallback(tmp_path, num_subsets=8)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    with pytest.raises(Exception, match=r"has the token id|index out of range"):
        trainer.fit(LanguageModule(), loader(Broken(21)))
