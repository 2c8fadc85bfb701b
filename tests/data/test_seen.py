"""Examples that a fit never saw."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from stride_lightning import attribute
from tests.helpers.models import Classifier, build, classification_data, make_trainer

DATA = classification_data(20)


def fit(folder, loader, **options):
    model = build(Classifier)
    make_trainer(folder, **{"max_epochs": 1} | options).fit(model, loader)
    return model


def attributed(model, train_data=DATA, **options):
    return attribute(model, DATA, train_data=train_data, method="grad-dot", show_progress=False, **options)


@pytest.mark.parametrize(
    ("loading", "options", "count"),
    [
        ({"batch_size": 4}, {"limit_train_batches": 3, "max_epochs": 2}, 12),
        ({"batch_size": 6, "drop_last": True}, {}, 18),
        ({"batch_size": 4, "sampler": [7, 2, 3, 9, 5, 6]}, {"max_steps": 1}, 4),
        ({"batch_size": 4, "sampler": torch.arange(6)}, {"max_steps": 1}, 4),
    ],
    ids=["limit", "drop_last", "max_steps", "tensor"],
)
def test_the_order_tells_which(tmp_path, loading, options, count):
    loader = DataLoader(DATA, **loading)
    attribution = attributed(fit(tmp_path, loader, **options), loader)
    columns = attribution.num_train
    assert attribution.train_info == {"seen": [True] * count + [False] * (columns - count)}
    (note,) = attribution.metadata["notes"][-1:]
    assert note.startswith(f"{columns - count} of {columns} training examples were never seen in the last fit")


@pytest.mark.parametrize(
    ("loading", "options", "is_noted"),
    [
        ({"shuffle": True}, {"limit_train_batches": 3}, True),
        ({"shuffle": True, "drop_last": True, "batch_size": 6}, {}, True),
        ({"shuffle": True, "drop_last": True, "batch_size": 6}, {"max_epochs": 4}, False),
        ({"shuffle": True}, {}, False),
        ({}, {}, False),
        ({}, {"max_epochs": 2, "max_steps": 7}, False),
    ],
    ids=["limit", "drop_last", "drop_last, many epochs", "all", "in order", "second epoch cut short"],
)
def test_the_order_does_not_tell_which_or_all_were_seen(tmp_path, loading, options, is_noted):
    loader = DataLoader(DATA, **{"batch_size": 4} | loading)
    attribution = attributed(fit(tmp_path, loader, **options), loader)
    assert attribution.train_info == {}
    notes = attribution.metadata["notes"]
    assert len(notes) == is_noted
    assert all("some may never have been seen" in note for note in notes)


class Backwards(SequentialSampler):
    def __iter__(self):
        return reversed(range(20))


class BackwardBatches(BatchSampler):
    def __iter__(self):
        return reversed(list(super().__iter__()))


@pytest.mark.parametrize(
    ("loading", "note"),
    [
        (
            {"batch_size": 4, "sampler": Backwards(DATA)},
            "The last fit read 8 of 20 training examples in an epoch",
        ),
        ({"batch_sampler": BackwardBatches(Backwards(DATA), 4, False)}, "The last fit read only 2 batches in an epoch"),
        ({"batch_size": 4, "sampler": [1, 1, 1, 2, 2, 3, 4, 5, 6, 7]}, "The last fit read only 2 batches in an epoch"),
    ],
    ids=["sampler", "batch sampler", "repeats"],
)
def test_orders_that_cannot_be_told(tmp_path, loading, note):
    loader = DataLoader(DATA, **loading)
    attribution = attributed(fit(tmp_path, loader, limit_train_batches=2), loader)
    assert attribution.train_info == {}
    assert attribution.metadata["notes"][-1].startswith(note)
    assert not any("The last fit" in one for one in attributed(fit(tmp_path, loader), loader).metadata["notes"])


def test_a_checkpoint_tells_how_much_was_read(tmp_path):
    """But not by how many processes."""
    loader = DataLoader(DATA, 4)
    model = fit(tmp_path, loader, limit_train_batches=3)
    model.trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = build(Classifier, seed=1)
    (note,) = attributed(other, loader, ckpt_path=tmp_path / "run.ckpt").metadata["notes"]
    assert note.startswith("The last fit read 12 of 20 training examples in an epoch: some may never have been")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert attributed(other, loader, ckpt_path=tmp_path / "weights.pt").metadata["notes"] == []


def test_other_data_than_those_of_the_fit(tmp_path):
    loader = DataLoader(DATA, 4)
    model = fit(tmp_path, loader, limit_train_batches=3)
    other = DataLoader(classification_data(30), 4)
    assert attributed(model, other).metadata["notes"] == []
    for data in (DATA, DataLoader(DATA, 2, shuffle=True)):  # the fit's own loader counts
        assert attributed(model, data).train_info["seen"] == [True] * 12 + [False] * 8
