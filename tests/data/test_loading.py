"""How a DataLoader makes batches, and whether training can do so again."""

import pytest
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from stride_lightning.data.loading import Loading, check_loading, loading_of

DATA = list(range(20))


@pytest.mark.parametrize(
    ("loader", "loading"),
    [
        (DataLoader(DATA, 4), Loading(4, shuffle=False, drop_last=False)),
        (DataLoader(DATA, 3, shuffle=True, drop_last=True), Loading(3, shuffle=True, drop_last=True)),
        (DataLoader(DATA, 3, sampler=SubsetRandomSampler([1, 2])), Loading(3, shuffle=True, drop_last=False)),
        (
            DataLoader(DATA, 2, sampler=RandomSampler(DATA, replacement=True)),
            Loading(2, shuffle=True, drop_last=False, is_whole=False),
        ),
        (
            DataLoader(DATA, 2, sampler=RandomSampler(DATA, num_samples=5)),
            Loading(2, shuffle=True, drop_last=False, is_whole=False),
        ),
        (DataLoader(DATA, batch_sampler=[[1, 2]]), None),
        (DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 5, False)), Loading(5, False, False)),
    ],
)
def test_loading_is_that_of_the_loader(loader, loading):
    assert loading_of(loader) == loading


def test_a_batch_size_of_ones_own_wins():
    loading = Loading(4, shuffle=False, drop_last=True)
    assert check_loading(loading, None) == loading
    assert check_loading(loading, 7) == Loading(7, shuffle=False, drop_last=True)
    assert check_loading(None, 7) == Loading(7, shuffle=True, drop_last=False)


@pytest.mark.parametrize(
    ("loading", "batch_size", "message"),
    [
        (Loading(4, True, False, is_whole=False), 4, "draws with replacement, or only some examples"),
        (None, None, "do not say their batch size"),
        (None, 0, "`batch_size` must be an integer of at least 1, got 0"),
        (Loading(4, True, False), 2.5, r"`batch_size` must be an integer of at least 1, got 2\.5"),
    ],
)
def test_training_that_cannot_be_repeated_is_refused(loading, batch_size, message):
    with pytest.raises(ValueError, match=message):
        check_loading(loading, batch_size)


def test_what_a_weighted_sampler_draws_cannot_be_repeated():
    loader = DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 20, 20))
    assert loading_of(loader) == Loading(4, shuffle=True, drop_last=False, is_whole=False)
    wrapped = DistributedSamplerWrapper(RandomSampler(DATA, num_samples=5), num_replicas=2, rank=0)
    assert not loading_of(DataLoader(DATA, 4, sampler=wrapped)).is_whole
    assert not loading_of(DataLoader(DATA, 4, sampler=[3, 1])).shuffle
    for shuffle in (True, False):
        ranked = DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=shuffle)
        assert loading_of(DataLoader(DATA, 4, sampler=ranked)).shuffle is shuffle
