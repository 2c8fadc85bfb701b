"""Where examples come from: samplers, data modules, and what is refused."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from stride_lightning.data.sources import resolve_queries, resolve_train_data
from tests.helpers.models import Data, classification_data
from tests.helpers.tiny import read

DATA = classification_data(20)


# ---- samplers ---------------------------------------------------------------------------------------------------


READ_THROUGH = {
    "sequential": DataLoader(DATA, 4),
    "random": DataLoader(DATA, 4, shuffle=True),
    "given random": DataLoader(DATA, 4, sampler=RandomSampler(DATA)),
    "distributed": DataLoader(DATA, 4, sampler=DistributedSampler(DATA, num_replicas=3, rank=1)),
    "batch sampler": DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, drop_last=True)),
}
BUCKETED = type("Bucketed", (BatchSampler,), {})(SequentialSampler(DATA), 4, False)
IN_A_BATCH_SAMPLER = BatchSampler(SubsetRandomSampler([1, 2, 3]), 2, False)
#: Loaders with a sampler, and its name.
OTHER = {
    "subset": (DataLoader(DATA, 4, sampler=SubsetRandomSampler([1, 2, 3])), "SubsetRandomSampler"),
    "weighted": (DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 20, 20)), "WeightedRandomSampler"),
    "positions": (DataLoader(DATA, 4, sampler=[1, 2, 3]), "list"),
    "in a batch sampler": (DataLoader(DATA, batch_sampler=IN_A_BATCH_SAMPLER), "SubsetRandomSampler"),
    "own batches": (DataLoader(DATA, batch_sampler=[[1, 2], [3, 4]]), "list"),
    "own batch sampler": (DataLoader(DATA, batch_sampler=BUCKETED), "Bucketed"),
}


@pytest.mark.parametrize("source", READ_THROUGH.values(), ids=READ_THROUGH.keys())
def test_samplers_that_are_read_through(source):
    assert read(resolve_train_data(source))[0].equal(DATA.tensors[0])
    assert read(resolve_queries(source))[0].equal(DATA.tensors[0])


@pytest.mark.parametrize(("source", "name"), OTHER.values(), ids=OTHER)
def test_other_samplers_need_train_indices(source, name):
    with pytest.raises(ValueError, match=rf" a {name}.*does not say which examples.* Pass `train_indices=`"):
        resolve_train_data(source)
    with pytest.raises(ValueError, match=r"torch\.utils\.data\.Subset"):
        resolve_queries(source)
    assert resolve_train_data(source, [3, 1]).positions.tolist() == [3, 1]


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
        ([0, 20], ValueError, r"positions in 0\.\.19, got \[20\]"),
        ([-1], ValueError, r"positions in 0\.\.19, got \[-1\]"),
        ([], (TypeError, ValueError), "`train_indices` must be"),
        ([1, 2, 1], ValueError, r"names examples twice, such as 1\. Name"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "names no example"),
        (torch.tensor([0.5]), TypeError, "integer positions, at least one, got torch.float32"),
        (torch.ones(20, dtype=torch.bool), TypeError, "integer positions, at least one, got torch.bool"),
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
