"""Every kind of training data is attributed, or refused in words that name it: nothing else comes out."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from stride_lightning import FurtherTrainingCallback, StrideCallback, TracInCallback, attribute
from stride_lightning.callbacks.guard import RAISE
from stride_lightning.data import streams
from stride_lightning.model.weights import weight_hash
from stride_lightning.storage.records import read_info
from tests.helpers.data_sources import DATA, KINDS, QUERIES, answer, dropping, in_two, known_kinds
from tests.helpers.models import Classifier, build, make_trainer
from tests.helpers.processes import run_two, what_helper_saw

#: Words of a callback's own refusal.
STRIDE_REFUSES = dict.fromkeys(["graphs", "dict, with a loss", "one loader in a dict"], "STRIDE")
FURTHER_TRAINING_REFUSES = dict.fromkeys(["weighted", "replacement"], "draws with replacement")
every_kind = pytest.mark.parametrize("name", KINDS)


def fit(name, folder, *callbacks):
    kind = KINDS[name]
    torch.manual_seed(0)
    model, trainer = build(kind.model), make_trainer(folder, *callbacks, **{"max_epochs": 2} | kind.options)
    torch.manual_seed(1)
    trainer.fit(model, kind.make(folder))
    return model


def callbacks_for(kind):
    further = FurtherTrainingCallback(
        kind.queries,
        left_out=[1, 2],
        num_seeds=1,
        batch_size=8,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss=kind.loss,
    )
    return [StrideCallback(num_subsets=6, loss=kind.loss), TracInCallback(every_n_epochs=100, loss=kind.loss), further]


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Of each kind: a model and callbacks that watched its fit, what they said, and the weights without them."""
    folder, results = tmp_path_factory.mktemp("fits"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RAISE, "0")
        for name in known_kinds():
            bare, callbacks = fit(name, folder), callbacks_for(KINDS[name])
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                (folder / name).mkdir()
                model = fit(name, folder / name, *callbacks)
            model.trainer.save_checkpoint(folder / f"{name}.ckpt")
            results[name] = model, callbacks, [str(warning.message) for warning in caught], weight_hash(bare)
    return folder, results


def of(name, fits):
    if name not in fits[1]:
        pytest.skip("datasets is not installed")
    return fits[1][name]


@every_kind
def test_a_fit_is_watched_and_stays_as_it_would_be(name, fits):
    model, (stride, tracin, further), messages, bare = of(name, fits)
    assert weight_hash(model) == bare
    assert len(tracin.records) == 1
    refusals = {stride: STRIDE_REFUSES.get(name, ""), further: FURTHER_TRAINING_REFUSES.get(name, "")}
    for callback, own_words in refusals.items():
        words = KINDS[name].callbacks or own_words
        stopped = [message for message in messages if message.startswith(f"{type(callback).__name__} stopped")]
        assert len(callback.records) == (not words), stopped
        assert len(stopped) == bool(words)
        assert all(words in message for message in stopped)


class Sparse(Dataset):
    """None at one position, if any."""

    def __init__(self, missing):
        self.missing = missing

    def __len__(self):
        return 400

    def __getitem__(self, i):
        return None if i == self.missing else DATA[i % 24]


def test_a_none_that_the_start_or_only_the_end_of_a_fit_sees(tmp_path, caplog):
    """And the next fit of the same callback begins anew."""
    callback, kind = StrideCallback(num_subsets=6), KINDS["None"]
    for missing, count in ((0, 399), (231, 399), (None, 400)):  # 231 is seen at the end alone
        caplog.clear()
        with caplog.at_level("INFO"):
            trainer = make_trainer(tmp_path, callback, max_epochs=1)
            trainer.fit(build(kind.model), DataLoader(Sparse(missing), 40, collate_fn=dropping))
        assert read_info(callback.records[-1])["data"]["num_examples"] == count
        said = "StrideCallback: 1 training examples are None in Sparse and are left out."
        assert [record.message for record in caplog.records].count(said) == (missing is not None)
        assert ("0 training examples are None" in caplog.text) is False


@every_kind
def test_scores_are_those_of_the_same_examples(name, fits, monkeypatch):
    monkeypatch.setattr(streams, "MOST_EXAMPLES", 100)
    folder, kind, model = fits[0], KINDS[name], of(name, fits)[0]
    scores = answer(name, folder, model)
    if kind.refusal:
        assert kind.refusal in scores
        return
    assert scores.shape == (5, len(kind.positions))
    if name != "augmentation":
        plain = build(Classifier)
        plain.load_state_dict(model.state_dict())
        data = Subset(DATA, kind.positions)
        expected = attribute(plain, QUERIES, train_data=data, method="grad-dot", show_progress=False).scores
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def elsewhere(fits):
    """The answers of a second process, and those of two ranks that share the work."""
    folder = fits[0]
    what_helper_saw("data_sources.py", folder)
    return torch.load(folder / "alone.pt"), *run_two(in_two, folder)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "errors", "message"),
    [
        ("parts", ["ValueError"] * 2, "`train_data` (OfARank) gives other examples on every rank"),
        ("splits", ["ValueError"] * 2, "The ranks were given other training examples"),
        ("queries", ["ValueError"] * 2, "The ranks were given other queries"),
        ("stream fails", ["RankError", "ValueError"], "the second has no stream"),
        ("effect", ["RankError", "ValueError"], "cannot be read: Subset[1] raised IndexError"),
        (
            "fails",
            ["RankError", "ValueError"],
            "Training example 20 cannot be read: FailsOnTheSecond[20] raised OSError",
        ),
    ],
    ids=["parts", "splits", "queries", "stream fails", "effect", "fails"],
)
def test_ranks_with_other_data_are_refused_and_none_waits(case, errors, message, elsewhere):
    for saved, error in zip(elsewhere[1:], errors, strict=True):
        assert saved[case].startswith(error)
        assert message in saved[case]


@every_kind
@pytest.mark.distributed
def test_other_processes_answer_alike(name, fits, elsewhere, monkeypatch):
    monkeypatch.setattr(streams, "MOST_EXAMPLES", 100)
    here = answer(name, fits[0], of(name, fits)[0])
    for there in (saved[name] for saved in elsewhere):
        if name == "endless":  # no Trainer says there how much of it is read
            assert "gives more than 100 examples" in there
        elif name == "None" and isinstance(there, str):  # another rank may not have met it
            assert "is None" in there
        elif isinstance(here, str):
            assert there == here
        else:
            torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-6)
