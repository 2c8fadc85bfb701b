"""StrideCallback in a real fit of a language model, and what attribution makes of its record."""

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from stride_lightning import CausalLanguageModeling, StrideCallback, TracInCallback, attribute
from stride_lightning.steering import fit
from stride_lightning.storage.records import read_record
from tests.helpers.models import make_trainer
from tests.helpers.texts import LanguageModule, Texts, padded

TRAIN, QUERIES = Texts(21), Texts(4, seed=1)


def loader(data, shuffle=False):
    return DataLoader(data, 5, shuffle=shuffle, collate_fn=padded)


@pytest.fixture
def fitted(tmp_path):
    def run(precision="32-true", **options):
        torch.manual_seed(0)
        callback, model = StrideCallback(tmp_path / "records", num_subsets=8, **options), LanguageModule()
        callbacks = callback, TracInCallback(tmp_path / "tracin")
        trainer = make_trainer(tmp_path, *callbacks, max_epochs=2, precision=precision)
        trainer.fit(model, loader(TRAIN, shuffle=True))
        return model, callback

    return run


def ask(model, **options):
    return attribute(model, loader(QUERIES), train_data=loader(TRAIN), show_progress=False, **options)


def test_a_record_gives_the_scores_without_a_pass(fitted):
    model, callback = fitted()
    record = read_record(callback.records[-1])
    assert record.info["task"] == repr(CausalLanguageModeling("sum", normalised=True))
    assert record.info["layers"] == [f"network.blocks.{number}" for number in range(3)] + ["network.head"]
    assert set(record.groups) == {"design", "losses", "moments", "statistics"}
    scored = ask(model)
    assert scored.metadata["record"] == str(callback.records[-1])
    model.trainer = None
    computed = ask(model)
    assert computed.metadata["record"] is None
    assert torch.allclose(scored.scores, computed.scores, rtol=1e-4, atol=1e-7)
    # The mean over all tokens of a batch is that of sums over the tokens of a text, over the mean number of these.
    task = CausalLanguageModeling("sum")
    losses = torch.cat([task.loss(model(batch["input_ids"]), task.targets(batch)) for batch in loader(TRAIN)])
    counts = torch.cat([(task.targets(batch)[..., 1] > 0).sum(1) for batch in loader(TRAIN)])
    assert torch.allclose(record.tensors("losses")["train"], losses.detach() / counts.double().mean(), atol=1e-5)


def test_large_moments_are_left_out_and_computed_again(fitted, monkeypatch, caplog):
    monkeypatch.setattr(fit, "MOST_RECORDED", 1_000)
    with caplog.at_level("INFO"):
        model, callback = fitted(fit_operators=True)
    assert set(read_record(callback.records[-1]).groups) == {"design", "losses", "statistics", "operators"}
    assert "does not hold its moments, which would take 0 MiB" in caplog.text
    scored = ask(model)
    assert scored.metadata["record"] == str(callback.records[-1])
    assert "it has no moments of tokens, so that was computed on the spot" in scored.metadata["record_note"]
    model.trainer = None
    torch.testing.assert_close(scored.scores, ask(model).scores, rtol=1e-4, atol=1e-7)


def test_operators_are_recorded_and_used(fitted):
    model, callback = fitted(fit_operators=True)
    assert "operators" in read_record(callback.records[-1]).groups
    scored = ask(model, recovery="prior")
    assert scored.metadata["record"] == str(callback.records[-1])
    assert scored.metadata["design"]["num_subsets"] == 8
    model.trainer = None
    computed = ask(model, recovery="prior", num_subsets=8)
    assert torch.allclose(scored.scores, computed.scores, rtol=1e-3, atol=1e-6)
    assert torch.allclose(scored.std, computed.std, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_mixed_precision_leaves_records_too(fitted, precision):
    model, callback = fitted(precision=precision)
    scored = ask(model)
    assert scored.metadata["record"] == str(callback.records[-1])
    model.trainer = None
    assert torch.allclose(scored.scores, ask(model).scores, rtol=1e-3, atol=1e-6)
    exact = ask(model.float()).scores
    assert torch.corrcoef(torch.stack([scored.scores.flatten(), exact.flatten()]))[0, 1] > 0.99


def test_other_data_are_refused_or_computed(fitted):
    model, callback = fitted()
    other = loader(Texts(21, seed=9))
    with pytest.raises(ValueError, match="was made with other training data"):
        attribute(model, loader(QUERIES), train_data=other, record=callback.records[-1], show_progress=False)
    with pytest.warns(UserWarning, match="was made with other training data.*computed on the spot"):
        scored = attribute(model, loader(QUERIES), train_data=other, show_progress=False)
    assert scored.metadata["record"] is None
    assert "other training data" in scored.metadata["record_note"]
    with pytest.raises(ValueError, match="was made with task"):
        ask(model, task=CausalLanguageModeling("sum"), record=callback.records[-1])


def test_tracin_reads_its_checkpoints(fitted):
    model, _ = fitted()
    scored = ask(model, method="tracin")
    assert len(scored.metadata["checkpoints"]) == 2
    assert torch.isfinite(scored.scores).all()


def test_texts_that_cannot_be_read_are_refused_before_the_first_step(tmp_path):
    texts = [TRAIN[index] for index in range(len(TRAIN))]
    texts[2] = dict.fromkeys(("input_ids", "labels"), torch.tensor([], dtype=torch.int64))
    trainer = make_trainer(tmp_path, StrideCallback(tmp_path / "stride"), max_epochs=1)
    with pytest.raises(ValueError, match="Training example 2 has no token"):
        trainer.fit(LanguageModule(), loader(texts))


def test_classes_of_texts_are_recorded_too(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    class Classes(L.LightningModule):
        def __init__(self):
            super().__init__()
            sizes = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = BertConfig(**sizes, intermediate_size=8, max_position_embeddings=12, num_labels=3)
            self.bert = BertForSequenceClassification(config)

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).logits

        def training_step(self, batch, batch_idx):
            logits = self(batch["input_ids"], batch["attention_mask"])
            return torch.nn.functional.cross_entropy(logits, batch["labels"])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    def classes(batch_size):
        collate = lambda items: padded(items) | {"labels": torch.tensor([len(i["input_ids"]) % 3 for i in items])}  # noqa: E731
        return DataLoader(TRAIN, batch_size, collate_fn=collate)

    torch.manual_seed(0)
    model, callback = Classes(), StrideCallback(tmp_path, num_subsets=8)
    make_trainer(tmp_path, callback, max_epochs=1).fit(model, classes(5))
    scored = attribute(model, classes(5), train_data=classes(5), show_progress=False)
    assert scored.metadata["record"] == str(callback.records[-1])
    alone = attribute(model, classes(1), train_data=classes(3), batch_size=2, show_progress=False)
    assert (alone.scores - scored.scores).abs().max() < 1e-3 * scored.scores.abs().max()
