"""Data in fixed order: what is read, under which random state, on which device."""

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from stride_lightning.data.examples import Examples, first_batch, first_look
from stride_lightning.data.sources import resolve_train_data
from tests.helpers.models import Augmented, Data, Dicts, classification_data
from tests.helpers.tiny import CPU, read

DATA = classification_data(20)


def test_positions_and_subsets():
    examples = Examples(DATA, positions=torch.tensor([5, 2, 9, 0]))
    assert len(examples) == 4
    assert examples[2][0].equal(DATA[9][0])
    part = examples.subset([3, 1])
    assert part.positions.tolist() == [0, 2]
    assert read(part)[0].equal(DATA.tensors[0][[0, 2]])
    assert first_batch(examples, 2, CPU)[0].equal(DATA.tensors[0][[5, 2]])
    assert len(first_batch(examples, 50, CPU)[0]) == 4


def test_collate_function_and_worker_init_are_used():
    def doubled(items):
        x, y = default_collate(items)
        return 2 * x, y

    examples = resolve_train_data(DataLoader(DATA, 4, collate_fn=doubled, shuffle=True))
    assert read(examples)[0].equal(2 * DATA.tensors[0])


@pytest.mark.filterwarnings("ignore:Two reads of one example")
def test_augmentation_depends_on_the_position_alone():
    one = read(Examples(Augmented(DATA)), 3)
    torch.manual_seed(99)
    two = read(Examples(Augmented(DATA), num_workers=2), 20)
    assert one[0].equal(two[0])
    assert one[1] == two[1]
    assert not one[0].equal(DATA.tensors[0])
    part = read(Examples(Augmented(DATA), positions=torch.tensor([7, 3])))[0]
    assert part.equal(one[0][[7, 3]])
    assert Examples(Augmented(DATA)).is_random
    assert not Examples(DATA).is_random


def test_augmentation_is_warned_of_once():
    examples = Examples(Augmented(DATA))
    with pytest.warns(UserWarning, match="Augmented differ.*length, shapes and targets") as caught:
        first_batch(examples, 4, CPU)
    assert len(caught) == 1
    read(examples)  # a second warning would be an error
    read(examples.subset(range(5)))


class Rolling(Dataset):
    """Draws from all three global generators on every read."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]), 0  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:Two reads of one example")
def test_random_states_are_left_alone():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    examples = Examples(Rolling())
    inputs, _ = read(examples)
    assert states() == before
    first_batch(examples, 3, CPU)
    assert states() == before
    next(examples.batches(3, CPU))  # abandoned half way
    assert states() == before
    assert len(inputs.unique()) == 60


def test_transfer_hooks_run_in_order_and_the_data_modules_win():
    class Hooked(Data):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            assert device == CPU
            return batch[0] * 2, batch[1]

    class Model(torch.nn.Module):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            raise AssertionError("the data module has its own")

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] - 3, batch[1]

    examples = resolve_train_data(Hooked(DATA, DATA), model=Model())
    assert read(examples)[0].equal((DATA.tensors[0] + 1) * 2 - 3)


def test_batches_of_any_nesting_are_moved():
    pair = namedtuple("Pair", "x y")
    examples = Examples(Dicts(DATA), collate_fn=lambda items: pair(default_collate(items), [torch.zeros(1)]))
    batch = first_batch(examples, 3, torch.device("meta"))
    assert batch.x["features"].device.type == batch.y[0].device.type == "meta"
    assert isinstance(batch, pair)


def test_a_few_texts_are_looked_at_and_many_other_examples():
    texts = [{"input_ids": torch.arange(5)} for _ in range(100)]
    assert len(first_look(resolve_train_data(texts), 256, CPU)["input_ids"]) == 4
    assert len(first_look(resolve_train_data(texts), 2, CPU)["input_ids"]) == 2
    others = TensorDataset(torch.zeros(100, 3))
    assert len(first_look(resolve_train_data(others), 256, CPU)[0]) == 32
