"""Where examples come from: samplers, data modules, and what is refused."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from stride_lightning.data.loading import Loading, NoPositionsError
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from tests.helpers.models import Classifier, Data, build, classification_data, make_trainer
from tests.helpers.tiny import CPU, read

DATA = classification_data(20)


# ---- samplers ---------------------------------------------------------------------------------------------------


class Bucketed(BatchSampler):
    """A batch sampler of the user's, around another sampler."""


class Curriculum(Sampler):
    """A sampler that does not say what it draws."""

    def __iter__(self):
        return iter([3, 1])


class Chosen(Curriculum):
    def __init__(self, indices):
        self.indices = indices

    def __iter__(self):
        return iter([self.indices[i] for i in torch.randperm(len(self.indices)).tolist()])


def wrapped(sampler):
    """As Lightning wraps samplers in distributed runs."""
    return DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)


class Ranked(Chosen):
    """Its ``indices`` are ranks in another list."""

    def __iter__(self):
        return iter([19 - i for i in self.indices])


class Moving(Chosen):
    def set_epoch(self, epoch):
        self.indices = [epoch]


WEIGHTED = WeightedRandomSampler([0.0, 1.0] * 10, 5)
UNKNOWN = "The Curriculum does not say which examples it draws: some may never have been seen."
REPEATS = "The RandomSampler draws with replacement, which does not change what a score means."
WEIGHTS = "The WeightedRandomSampler's weights do not change what a score means: what training on an example does. "


def left_out(count, name):
    return f"{count} of 20 examples are left out: the {name} never draws them."


#: Arguments of a loader; positions that are read (None: all), and what is said.
SAMPLERS = {
    "sequential": ({}, None, ""),
    "random": ({"shuffle": True}, None, ""),
    "given random": ({"sampler": RandomSampler(DATA)}, None, ""),
    "distributed": ({"sampler": DistributedSampler(DATA, num_replicas=3, rank=1)}, None, ""),
    "batch sampler": ({"batch_sampler": BatchSampler(RandomSampler(DATA), 4, drop_last=True)}, None, ""),
    "bucketed": ({"batch_sampler": Bucketed(SequentialSampler(DATA), 4, False)}, None, ""),
    "wrapped": ({"sampler": wrapped(RandomSampler(DATA))}, None, ""),
    "replacement": ({"sampler": RandomSampler(DATA, replacement=True)}, None, REPEATS),
    "few": ({"sampler": RandomSampler(range(3))}, [0, 1, 2], left_out(17, "RandomSampler")),
    "subset": ({"sampler": SubsetRandomSampler([7, 2, 3])}, [2, 3, 7], left_out(17, "SubsetRandomSampler")),
    "wrapped subset": ({"sampler": wrapped(SubsetRandomSampler([7, 2]))}, [2, 7], left_out(18, "SubsetRandomSampler")),
    "indices": ({"sampler": Chosen(torch.tensor([7, 2, 7]))}, [2, 7], left_out(18, "Chosen")),
    "weighted": (
        {"sampler": WEIGHTED},
        list(range(1, 20, 2)),
        WEIGHTS + left_out(10, "WeightedRandomSampler"),
    ),
    "batches of a weighted one": (
        {"batch_sampler": BatchSampler(WEIGHTED, 2, False)},
        list(range(1, 20, 2)),
        WEIGHTS + left_out(10, "WeightedRandomSampler"),
    ),
    "list": ({"sampler": [7, 2, 3]}, [7, 2, 3], left_out(17, "sampler, a list,")),
    "list of batches": ({"batch_sampler": [[7, 2], [3]]}, [7, 2, 3], left_out(17, "sampler, a list,")),
    "all in another order": ({"sampler": list(range(19, -1, -1))}, list(range(19, -1, -1)), ""),
    "counted from the end": ({"sampler": [-1, -20, 3]}, [19, 0, 3], left_out(17, "sampler, a list,")),
    "tensor": ({"sampler": torch.tensor([7, 2])}, [7, 2], left_out(18, "sampler, a list,")),
    "array of batches": ({"batch_sampler": np.array([[7, 2], [3, 7]])}, [7, 2, 3], left_out(17, "sampler, a list,")),
    "unknown": ({"sampler": Curriculum()}, None, UNKNOWN),
    "indices of an epoch": ({"sampler": Moving([7, 2])}, None, UNKNOWN.replace("Curriculum", "Moving")),
    "indices that are texts": ({"sampler": Chosen(["a"])}, None, UNKNOWN.replace("Curriculum", "Chosen")),
    "indices by class": ({"sampler": Chosen({"a": [1], "b": [3]})}, None, UNKNOWN.replace("Curriculum", "Chosen")),
    "indices of something else": ({"sampler": Ranked(range(10))}, None, UNKNOWN.replace("Curriculum", "Ranked")),
    "indices beyond": ({"sampler": Chosen([20])}, None, UNKNOWN.replace("Curriculum", "Chosen")),
}


@pytest.mark.parametrize("how", SAMPLERS)
@pytest.mark.parametrize("resolve", [resolve_train_data, resolve_queries])
def test_positions_are_read_off_the_sampler(resolve, how):
    options, positions, note = SAMPLERS[how]
    random_state = torch.get_rng_state()
    examples = resolve(DataLoader(DATA, **({} if "batch_sampler" in options else {"batch_size": 4}) | options))
    expected = list(range(20)) if positions is None else positions
    assert examples.positions.tolist() == expected
    assert read(examples)[0].equal(DATA.tensors[0][expected])
    assert examples.notes == ((note,) if note else ())
    assert torch.get_rng_state().equal(random_state)


def test_train_indices_say_more_than_a_sampler():
    examples = resolve_train_data(DataLoader(DATA, 4, sampler=Curriculum()), [3, 1])
    assert (examples.positions.tolist(), examples.notes) == ([3, 1], ())


# ---- queries beside training data -------------------------------------------------------------------------------


def doubled(items):
    x, y = default_collate(items)
    return 2 * x, y


def test_queries_are_collated_and_moved_as_the_training_data_beside_them():
    class Shifting(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

        def train_dataloader(self):
            return DataLoader(DATA, 4, collate_fn=doubled)

    train = resolve_train_data(Shifting())
    assert read(resolve_queries(DATA, beside=train))[0].equal(2 * DATA.tensors[0] + 1)
    assert read(resolve_queries(DataLoader(DATA, 4), beside=train))[0].equal(DATA.tensors[0] + 1)
    assert read(resolve_queries(DATA))[0].equal(DATA.tensors[0])


# ---- data that make batches themselves --------------------------------------------------------------------------


class Batches(Dataset):
    """Makes a batch of a list of positions, as data of single cells do."""

    def __init__(self, num_examples=20):
        self.num_examples = num_examples

    def __len__(self):
        return self.num_examples

    def __getitem__(self, positions):
        assert isinstance(positions, list)
        x, y = DATA.tensors
        return {"x": x[positions].numpy(), "y": y[positions].numpy()}


def listed(dataset, sampler=None, **options):
    sampler = BatchSampler(SequentialSampler(dataset), 3, drop_last=False) if sampler is None else sampler
    return DataLoader(dataset, sampler=sampler, batch_size=None, **options)


class Lists(Sampler):
    """Draws lists of positions, in an order of its own."""

    def __iter__(self):
        yield from torch.randperm(20).reshape(5, 4).tolist()


@pytest.mark.parametrize("batch_size", [1, 6, 20])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_makes_batches_of_lists(batch_size, workers):
    examples = resolve_train_data(listed(Batches(), num_workers=workers if batch_size == 6 else 0))
    batches, digests = zip(*examples.batches(batch_size, CPU), strict=True)
    assert torch.cat([batch["x"] for batch in batches]).equal(DATA.tensors[0])
    assert torch.cat(digests).equal(next(examples.batches(20, CPU))[1])
    assert len(torch.cat(digests).unique(dim=0)) == 20
    assert examples.loading == Loading(3, shuffle=False, drop_last=False)


def test_samplers_of_lists():
    some = resolve_train_data(listed(Batches(), BatchSampler(SubsetRandomSampler([7, 2]), 2, False)))
    assert next(some.batches(2, CPU))[0]["x"].equal(DATA.tensors[0][[2, 7]])
    random_state = torch.get_rng_state()
    own = resolve_train_data(listed(Batches(), Lists()))
    assert len(own) == 20
    assert torch.get_rng_state().equal(random_state)


def test_lists_of_examples_of_two_datasets():
    """Queries of the same dataset share a batch with training examples; those of another cannot."""
    data = Batches()
    train = resolve_train_data(listed(data))
    queries = resolve_queries(data, beside=train)
    assert next(queries.batches(2, CPU))[0]["y"].equal(DATA.tensors[1][:2])
    assert train.collate_fn([train[3], queries[0]])["x"].equal(DATA.tensors[0][[3, 0]])
    other = resolve_queries(listed(Batches()))
    with pytest.raises(ValueError, match="two datasets, each of which makes batches by itself"):
        train.collate_fn([train[3], other[0]])
    plain = resolve_queries(list(DATA), beside=train)  # which takes no list of positions
    assert read(plain)[0].equal(DATA.tensors[0])


class Around:
    """An iterable around a loader."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def test_an_iterable_around_a_loader():
    with pytest.raises(NoPositionsError, match="`train_data` loader, a Around, makes its batches in a way of"):
        resolve_train_data(Around(DataLoader(DATA, 4)))


class Zipped(DataLoader):
    """A loader of two loaders, as packages have."""

    def __iter__(self):
        yield from zip(self.dataset, self.dataset, strict=True)


class Filtering(DataLoader):
    def _get_iterator(self):
        return map(torch.stack, super()._get_iterator())


class Named(DataLoader):
    """A loader with a collate function of its own."""

    def __init__(self, dataset, **options):
        super().__init__(dataset, collate_fn=doubled, **options)


@pytest.mark.parametrize(
    "loader", [Zipped(DATA), Filtering(DATA), DataLoader(DataLoader(DATA, 4))], ids=["zip", "filter", "twice"]
)
def test_loaders_that_make_batches_in_a_way_of_their_own(loader):
    for resolve in (resolve_train_data, resolve_queries):
        with pytest.raises(NoPositionsError, match=f"a {type(loader).__name__}, makes its batches in a way of its own"):
            resolve(loader)
    assert read(resolve_train_data(Named(DATA, batch_size=3)))[0].equal(2 * DATA.tensors[0])


class ByHand:
    """An iterable of batches, which a Trainer takes for a loader."""

    def __iter__(self):
        return iter(DataLoader(DATA, 4))


def test_an_iterable_of_batches_is_no_stream_of_examples(tmp_path):
    batches = ByHand()
    module = LightningDataModule()
    module.train_dataloader = module.test_dataloader = lambda: batches
    model = build(Classifier)
    make_trainer(tmp_path, max_epochs=1).fit(model, batches)
    for resolve in (lambda: resolve_train_data(module), lambda: resolve_train_data(batches, model=model)):
        with pytest.raises(NoPositionsError, match="loader, a ByHand, makes its batches in a way of its own"):
            resolve()
    with pytest.raises(NoPositionsError, match="`queries` loader, a ByHand"):
        resolve_queries(module)
    module.train_dataloader = lambda: CombinedLoader([DataLoader(DATA, 4)], "sequential")
    assert len(resolve_train_data(module)) == len(DATA)


# ---- several loaders --------------------------------------------------------------------------------------------


def test_loaders_one_after_the_other():
    first, second = DataLoader(DATA, 4, sampler=SubsetRandomSampler([7, 2])), DataLoader(Subset(DATA, [5, 6]), 3)
    several = {"a": first, "b": [second]}
    joint = resolve_train_data(several, has_rows_loss=True)
    for examples in (joint, resolve_train_data(CombinedLoader(several, "sequential")), resolve_queries(several)):
        assert examples.positions.tolist() == [2, 7, 20, 21]
        assert read(examples)[0].equal(DATA.tensors[0][[2, 7, 5, 6]])
        assert examples.info() == {"loader": ["a", "a", "b.0", "b.0"], "position": [2, 7, 0, 1]}
        assert examples.notes == (left_out(18, "SubsetRandomSampler"),)
    assert resolve_queries([first, second]).info()["loader"] == [0, 0, 1, 1]


def test_a_single_loader_in_a_structure():
    """Training gets batches inside the structure."""
    joint = resolve_train_data({"a": [DataLoader(DATA, 4)]})
    (batch, _) = next(joint.batches(3, CPU))
    assert batch["a"][0][0].equal(DATA.tensors[0][:3])
    assert next(resolve_queries(DATA, beside=joint).batches(3, CPU))[0]["a"][0][0].equal(DATA.tensors[0][:3])
    assert read(resolve_queries([DataLoader(DATA, 4)]))[0].equal(DATA.tensors[0])


TWO = {"a": DataLoader(DATA, 4), "b": DataLoader(DATA, 2)}
OTHER_COLLATE = [DataLoader(DATA, 4), DataLoader(DATA, 4, collate_fn=doubled)]


@pytest.mark.parametrize(
    ("source", "has_rows_loss", "message"),
    [
        *((CombinedLoader(TWO, mode), False, mode) for mode in ("min_size", "max_size", "max_size_cycle")),
        (TWO, False, r"`train_data` are 2 loaders \(a, b\).*of all of them.*Pass `loss=fn` with"),
        (list(TWO.values()), False, r"`train_data` are 2 loaders \(0, 1\).*of all of them"),
        (OTHER_COLLATE, True, "with different collate_fns"),
        (CombinedLoader([[1, 2]], "min_size"), True, "a list, makes its batches in a way of its own"),
    ],
    ids=["min", "max", "cycle", "dict", "list", "collate_fn", "no loader"],
)
def test_loaders_whose_examples_have_no_batch_of_their_own(source, has_rows_loss, message):
    with pytest.raises(NoPositionsError, match=message):
        resolve_train_data(source, has_rows_loss=has_rows_loss)


# ---- what is refused --------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (DataLoader(Stream(), None), ValueError, r"is a stream \(Stream\) read with batch_size=None"),
        (DataLoader(DATA, batch_size=None), ValueError, "batch_size=None"),
        (DATA.tensors, TypeError, "got tuple. Wrap tensors in torch.utils.data.TensorDataset"),
        (DATA.tensors[0], TypeError, "got Tensor"),
        ({"a": DATA.tensors[0]}, TypeError, "got dict"),
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
