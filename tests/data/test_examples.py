"""Data in fixed order: reading, fingerprints, and what is refused."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from stride_lightning.data.examples import Examples, first_batch, first_look
from stride_lightning.data.fingerprints import Fingerprint
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from tests.helpers.models import Augmented, Data, Dicts, classification_data

CPU = torch.device("cpu")
DATA = classification_data(20)


def read(examples, batch_size=6):
    """All inputs in order, and the fingerprint."""
    fingerprint, inputs = Fingerprint(content=not examples.is_random), []
    for batch, digests, size in examples.batches(batch_size, CPU):
        assert size == len(digests) == len(batch[0])
        fingerprint.update(digests, batch[1])
        inputs.append(batch[0])
    return torch.cat(inputs), fingerprint.summary()


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 20, 100])
def test_everything_is_read_once_in_order(batch_size):
    inputs, summary = read(Examples(DATA), batch_size)
    assert inputs.equal(DATA.tensors[0])
    assert summary == read(Examples(DATA))[1]


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
    next(iter(examples.batches(3, CPU)))  # abandoned half way
    assert states() == before
    assert len(inputs.unique()) == 60


# ---- fingerprints -----------------------------------------------------------------------------------------------


def fingerprint_of(dataset):
    return read(Examples(dataset))[1]


def test_fingerprint_sees_every_change():
    x, y = DATA.tensors
    pixel, label = x.clone(), y.clone()
    pixel[3, 1] = torch.nextafter(pixel[3, 1], torch.tensor(9.0))
    label[4] = 2 - label[4] if label[4] != 1 else 0
    others = {
        "same": DATA,
        "pixel": TensorDataset(pixel, y),
        "label": TensorDataset(x, label),
        "order": Subset(DATA, [1, 0, *range(2, 20)]),
        "length": Subset(DATA, range(19)),
        "dtype": TensorDataset(x.double(), y),
        "shape": TensorDataset(x.reshape(20, 2, 2), y),
    }
    prints = {name: fingerprint_of(dataset) for name, dataset in others.items()}
    assert prints["same"] == fingerprint_of(DATA)
    assert len({p["content"] for p in prints.values()}) == len(others)
    assert prints["pixel"]["targets"] == prints["same"]["targets"] != prints["label"]["targets"]


@pytest.mark.filterwarnings("ignore:Two reads of one example")
@pytest.mark.parametrize("batch_size", [1, 6, 20])
def test_fingerprint_under_augmentation_is_of_shapes_and_targets(batch_size):
    """And does not depend on how examples are batched."""
    x, y = DATA.tensors
    _, summary = read(Examples(Augmented(DATA)), batch_size)
    assert summary == read(Examples(Augmented(TensorDataset(x + 1, y))), 4)[1]
    assert summary["content"] is None
    assert summary != read(Examples(Augmented(TensorDataset(x, 2 - y))), 4)[1]
    assert summary != read(Examples(Augmented(TensorDataset(x[:, :3], y))), 4)[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros(3), np.zeros(3, np.float32)),
        ({"a": 1}, {"b": 1}),
        ([1, 2], [[1], 2]),
        ("ab", b"ab"),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (torch.tensor(True), torch.tensor(False)),
        (None, 0),
    ],
)
def test_kinds_of_content(one, other):
    def digest(value):
        examples = Examples([(value, 0)], collate_fn=lambda items: items)
        return next(iter(examples.batches(1, CPU)))[1].tolist()

    assert digest(one) == digest(one)
    assert digest(one) != digest(other)


def test_pictures_and_objects():
    image = pytest.importorskip("PIL.Image")
    red, blue = (image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    examples = Examples([(red, 0), (blue, 0), (red, 0)], collate_fn=lambda items: items)
    digests = next(iter(examples.batches(3, CPU)))[1]
    assert digests[0].equal(digests[2])
    assert not digests[0].equal(digests[1])
    with pytest.raises(TypeError, match="holds a object, whose content cannot be fingerprinted"):
        Examples([(object(), 0)]).is_random  # noqa: B018


# ---- samplers ---------------------------------------------------------------------------------------------------


READ_THROUGH = {
    "sequential": DataLoader(DATA, 4),
    "random": DataLoader(DATA, 4, shuffle=True),
    "given random": DataLoader(DATA, 4, sampler=RandomSampler(DATA)),
    "distributed": DataLoader(DATA, 4, sampler=DistributedSampler(DATA, num_replicas=3, rank=1)),
    "batch sampler": DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, drop_last=True)),
}
OTHER = {
    "subset": DataLoader(DATA, 4, sampler=SubsetRandomSampler([1, 2, 3])),
    "weighted": DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 20, 20)),
    "positions": DataLoader(DATA, 4, sampler=[1, 2, 3]),
    "in a batch sampler": DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler([1, 2, 3]), 2, False)),
    "own batches": DataLoader(DATA, batch_sampler=[[1, 2], [3, 4]]),
    "own batch sampler": DataLoader(
        DATA, batch_sampler=type("Bucketed", (BatchSampler,), {})(SequentialSampler(DATA), 4, False)
    ),
}


@pytest.mark.parametrize("source", READ_THROUGH.values(), ids=READ_THROUGH.keys())
def test_samplers_that_are_read_through(source):
    assert read(resolve_train_data(source))[0].equal(DATA.tensors[0])
    assert read(resolve_queries(source))[0].equal(DATA.tensors[0])


@pytest.mark.parametrize("source", OTHER.values(), ids=OTHER.keys())
def test_other_samplers_need_train_indices(source):
    with pytest.raises(ValueError, match=r"cannot be told. Pass `train_indices=`"):
        resolve_train_data(source)
    with pytest.raises(ValueError, match=r"torch\.utils\.data\.Subset"):
        resolve_queries(source)
    assert resolve_train_data(source, [3, 1]).positions.tolist() == [3, 1]


def test_the_sampler_is_named():
    with pytest.raises(ValueError, match="a SubsetRandomSampler"):
        resolve_train_data(OTHER["in a batch sampler"])
    with pytest.raises(ValueError, match="a Bucketed"):
        resolve_train_data(OTHER["own batch sampler"])


def test_samplers_that_lightning_wraps():
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    def wrapped(sampler):
        return DataLoader(DATA, 4, sampler=DistributedSamplerWrapper(sampler, num_replicas=2, rank=0))

    assert len(resolve_train_data(wrapped(RandomSampler(DATA)))) == 20
    with pytest.raises(ValueError, match="Pass `train_indices=`"):
        resolve_train_data(wrapped(SubsetRandomSampler([1, 2])))


# ---- what is refused --------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (Stream(), TypeError, "IterableDataset.*Stream.*map-style"),
        (DataLoader(Stream(), 4), TypeError, "IterableDataset.*Stream"),
        (DataLoader(DATA, batch_size=None), ValueError, "batch_size=None"),
        (DATA.tensors, TypeError, "got tuple. Wrap tensors in torch.utils.data.TensorDataset"),
        (DATA.tensors[0], TypeError, "got Tensor"),
        ({"a": DataLoader(DATA)}, TypeError, "got dict.*pass one of several loaders"),
        ("data", TypeError, "got str"),
        ([], ValueError, "is empty"),
        (7, TypeError, "got int"),
    ],
)
def test_sources_that_are_refused(source, error, message):
    with pytest.raises(error, match=f"`train_data`.*{message}|`train_data` {message}"):
        resolve_train_data(source)
    with pytest.raises(error, match="`queries`"):
        resolve_queries(source)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 20], ValueError, r"positions in 0\.\.19"),
        ([-1], ValueError, r"positions in 0\.\.19"),
        ([], (TypeError, ValueError), "`train_indices` must be"),
        ([1, 2, 1], ValueError, "names some examples twice"),
        (torch.tensor([0.5]), TypeError, "integer positions, got torch.float32"),
        (torch.ones(20, dtype=torch.bool), TypeError, "integer positions, got torch.bool"),
    ],
    ids=str,
)
def test_train_indices_that_are_refused(indices, error, message):
    with pytest.raises(error, match=message):
        resolve_train_data(DATA, indices)


# ---- data modules and hooks -------------------------------------------------------------------------------------


def test_datamodule_is_set_up_unless_attached():
    data = Data()
    assert len(resolve_train_data(data)) == 60
    assert data.calls == ["prepare_data", "fit"]
    data.trainer = object()
    resolve_train_data(data)
    assert data.calls == ["prepare_data", "fit"]


def test_queries_are_test_data_else_validation_data():
    assert len(resolve_queries(Data())) == 4
    given = LightningDataModule.from_datasets(val_dataset=DATA)
    assert len(resolve_queries(given)) == 20
    both = LightningDataModule.from_datasets(val_dataset=DATA, test_dataset=Subset(DATA, [1, 2]))
    assert len(resolve_queries(both)) == 2
    with pytest.raises(ValueError, match="neither test_dataloader nor val_dataloader"):
        resolve_queries(LightningDataModule.from_datasets(train_dataset=DATA))


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
    from collections import namedtuple

    pair = namedtuple("Pair", "x y")
    examples = Examples(Dicts(DATA), collate_fn=lambda items: pair(default_collate(items), [torch.zeros(1)]))
    batch = first_batch(examples, 3, torch.device("meta"))
    assert batch.x["features"].device.type == batch.y[0].device.type == "meta"
    assert isinstance(batch, pair)


def test_a_few_texts_are_looked_at_and_many_other_examples():
    device = torch.device("cpu")
    texts = [{"input_ids": torch.arange(5)} for _ in range(100)]
    assert len(first_look(resolve_train_data(texts), 256, device)["input_ids"]) == 4
    assert len(first_look(resolve_train_data(texts), 2, device)["input_ids"]) == 2
    others = TensorDataset(torch.zeros(100, 3))
    assert len(first_look(resolve_train_data(others), 256, device)[0]) == 64
