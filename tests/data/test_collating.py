"""Examples that cannot be read or batched: errors name them by kind and position."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.data.reading import Reading
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.tasks.likelihoods import Classification
from tests.helpers.models import classification_data
from tests.helpers.tiny import CPU, read

DATA = classification_data(20)
SIDES = pytest.mark.parametrize(
    ("resolve", "kind"), [(resolve_train_data, "training example"), (resolve_queries, "query")], ids=["train", "query"]
)


class Except(Dataset):
    """Other data, with something else at one position."""

    def __init__(self, position, instead):
        self.position, self.instead = position, instead

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return self.instead() if i == self.position else DATA[i]


def missing():
    raise KeyError("scan_13.png")


def longer():
    return torch.ones(5), torch.tensor(1)


def dropping(items):
    return default_collate([item for item in items if item[0][0] > -1])


@SIDES
@pytest.mark.parametrize("position", [0, 13])
def test_an_example_that_cannot_be_read(resolve, kind, position):
    examples = resolve(Except(position, missing))
    cause = rf"Except\[{position}\] raised KeyError: 'scan_13.png'\."
    message = rf"^{kind.capitalize()} {position} cannot be read: {cause} Mend the dataset, or leave this one out: "
    with pytest.raises(ValueError, match=message) as caught:
        read(examples)
    assert isinstance(caught.value.__cause__, KeyError)
    assert read(examples.subset([5, 7]))[0].equal(DATA.tensors[0][[5, 7]])
    with pytest.raises(ValueError, match=message):
        list(examples.drawn([torch.tensor([1, position])], 0, CPU))
    with pytest.raises(ValueError, match=message):
        first_batch(examples, 20, CPU)


def test_an_example_that_a_worker_cannot_read():
    examples = resolve_train_data(DataLoader(Except(18, missing), batch_size=4, num_workers=1))
    with pytest.raises(ValueError, match=r"(?s)scan_13.png.*Training example 18 cannot be read"):
        read(examples)


@SIDES
def test_an_example_that_is_none(resolve, kind):
    """Whether a collate function would drop it or not."""

    def present(items):
        return default_collate([item for item in items if item is not None])

    for options in ({}, {"collate_fn": present}):
        examples = resolve(DataLoader(Except(13, lambda: None), batch_size=4, **options))
        with pytest.raises(ValueError, match=f"^{kind.capitalize()} 13 is None. .*Subset"):
            read(examples)


@SIDES
def test_examples_of_different_sizes(resolve, kind):
    examples = resolve(Except(13, longer))
    message = rf"^{kind.capitalize()} 10 and {kind} 13 cannot be put into a batch: default_collate raised .*\. Pass a "
    with pytest.raises(ValueError, match=message + "DataLoader with the collate_fn of training, for the queries too"):
        read(examples, 10)
    assert read(examples.subset([13]), 4)[0].shape == (1, 5)


def test_an_example_that_cannot_be_batched_even_alone():
    examples = Examples(Except(13, lambda: (torch.ones(4), None)))
    with pytest.raises(ValueError, match=r"^Example 13 cannot be put into a batch: default_collate raised TypeError"):
        read(examples)


def test_a_collate_function_that_fails_on_the_whole_batch_alone():
    def at_most_three(items):
        assert len(items) < 4
        return default_collate(items)

    with pytest.raises(
        ValueError, match=r"^Example 0 and example 1 and 4 more cannot .*at_most_three raised Assertion"
    ):
        read(Examples(DATA, collate_fn=at_most_three))


def test_a_collate_function_that_returns_nothing():
    with pytest.raises(ValueError, match=r"^<lambda> returned None for example 0 and example 1 and 4 more"):
        read(Examples(DATA, collate_fn=lambda items: None))


@SIDES
def test_a_collate_function_that_drops_examples(resolve, kind):
    x = DATA.tensors[0].clone()
    x[:, 0].clamp_(min=0)
    x[13, 0] = -2
    examples = resolve(DataLoader(TensorDataset(x, DATA.tensors[1]), batch_size=4, collate_fn=dropping))
    message = f"^dropping made a batch of 4 rows of 5 examples, without {kind} 13.*may drop or add none"
    with pytest.raises(ValueError, match=message):
        list(Reading(examples, Classification(), batch_size=5, device=CPU))


@SIDES
def test_a_collate_function_that_drops_targets(resolve, kind):
    def shorter(items):
        x, y = default_collate(items)
        return x, y[:-1]

    examples = resolve(DataLoader(DATA, batch_size=4, collate_fn=shorter))
    message = f"^The batch from {kind} 0 to 4 holds 4 targets for 5 examples.*may drop or add none"
    with pytest.raises(ValueError, match=message):
        list(Reading(examples, Classification(), batch_size=5, device=CPU))


def test_examples_are_called_what_they_are_used_as():
    """Queries that were training examples, and the other way round."""
    bad = TensorDataset(torch.full((20, 4), torch.nan), DATA.tensors[1])
    train = resolve_train_data(bad)
    queries = resolve_queries(train)
    assert (train.kind, queries.kind) == ("training example", "query")
    assert resolve_train_data(queries).kind == "training example"
    assert resolve_queries(queries) is queries


class Moved:
    """A batch whose ``to()`` moves it in place and returns nothing."""

    def __init__(self, values):
        self.values = values

    def to(self, device, **_):
        self.values = self.values.to(device)


def test_a_batch_whose_to_returns_nothing():
    examples = Examples(DATA, collate_fn=lambda items: (Moved(default_collate(items)[0]), default_collate(items)[1]))
    inputs, _ = first_batch(examples, 3, CPU)
    assert inputs.values.equal(DATA.tensors[0][:3])
