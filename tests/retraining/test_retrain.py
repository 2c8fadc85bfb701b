"""retrain() as users call it: their data, their mistakes, several processes."""

import inspect
import os
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset, default_collate

from stride_lightning import BinaryClassification, Classification
from stride_lightning.retraining.recipe import Recipe, Training
from stride_lightning.retraining.retrain import retrain, sample_masks
from stride_lightning.runtime.distributed import barrier, world_size
from stride_lightning.storage.records import write_record
from stride_lightning.tasks.own_loss import OwnLoss
from tests.helpers.models import Augmented, Dicts, DictTask, make_trainer
from tests.helpers.processes import run_two, start
from tests.retraining import cases
from tests.retraining.cases import NUM_QUERIES, NUM_TRAIN, Net, by_hand, mlp, numbers, plain_net, points, sgd

QUERIES = points(NUM_QUERIES, seed=1)
HOW = {"max_epochs": 2, "batch_size": 9}
OPTIMIZER = partial(torch.optim.SGD, lr=0.1)


def ask(model=plain_net, queries=QUERIES, **more):
    how = {"train_data": points(), "num_seeds": 2, "show_progress": False} | HOW | more
    if "masks" not in how:
        how.setdefault("num_subsets", 3)
    return retrain(model, queries, **how)


# ---- what comes back --------------------------------------------------------------------------------------------


def test_random_subsets_and_seeds():
    truth = ask(num_subsets=4, seed=7, fraction=0.4)
    assert truth.masks.equal(sample_masks(NUM_TRAIN, 4, 0.4, seed=7))
    assert truth.masks.sum(1).tolist() == [10] * 4
    assert len({tuple(mask) for mask in truth.masks.tolist()}) == 4
    assert truth.seeds == [7, 8]
    for number, seed in enumerate(truth.seeds):
        expected = by_hand(plain_net, points(), QUERIES, truth.masks, seed, **HOW)
        torch.testing.assert_close(truth.losses_by_seed[number], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(truth.losses, truth.losses_by_seed.mean(0))


def test_sampled_masks():
    masks = sample_masks(30, 2000, 0.3)
    assert (masks.sum(1) == 9).all()
    share = masks.float().mean(0)
    assert (share - 0.3).abs().max() < 0.05  # every example alike
    both = masks.float().T @ masks.float() / len(masks)
    pairs = both[~torch.eye(30, dtype=torch.bool)]
    assert (pairs - 0.3 * 8 / 29).abs().max() < 0.05  # and every pair
    assert masks.equal(sample_masks(30, 2000, 0.3))
    assert not masks.equal(sample_masks(30, 2000, 0.3, seed=1))


def row_losses(model, batch):
    return cases.cross_entropies(model(batch[0]), batch[1])


def test_metadata():
    truth = ask()
    known = {"model": "Net", "max_epochs": 2, "batch_size": 9, "shuffle": True, "drop_last": False, "seeds": [0, 1]}
    known |= {
        "measure": {"name": "loss", "direction": "lowers"},
        "task": "Classification()",
        "one_by_one_because": None,
        "trainer_fn": False,
    }
    assert {name: truth.metadata[name] for name in known} == known
    assert truth.metadata["seconds"] > 0
    assert "torch" in truth.metadata["versions"]
    assert truth.metadata["data"]["num_examples"] == NUM_TRAIN
    assert truth.metadata["query_data"]["num_examples"] == NUM_QUERIES
    assert len(set(truth.metadata["initial_weights"])) == 2
    assert "lr: 0.2" in truth.metadata["optimizer"]


# ---- data -------------------------------------------------------------------------------------------------------


class OfDicts(Net):
    def __init__(self):
        super().__init__(mlp(), sgd)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch["features"]), batch["answer"])


class Module(L.LightningDataModule):
    """Shuffled batches of nine; adds one to the inputs on the device."""

    def train_dataloader(self):
        return DataLoader(points(), 9, shuffle=True)

    def test_dataloader(self):
        return DataLoader(QUERIES, 4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]


def doubled(items):
    x, y = default_collate(items)
    return 2 * x, y


PARTS = [Subset(points(), part) for part in (range(11), range(11, NUM_TRAIN))]
TWO_LOADERS = [DataLoader(part, 9, shuffle=True, collate_fn=doubled) for part in PARTS]
CHOSEN = [3, 1, 20, 15, 16, 8, 24, 2, 5, 6, 7, 11]
#: A call, and the tensors that are trained on and asked about.
SOURCES = {
    "dicts": (
        {"queries": Dicts(QUERIES), "train_data": Dicts(points()), "task": DictTask(), "model": OfDicts},
        *(points(), QUERIES),
    ),
    "a data module with a hook": (
        {"queries": Module(), "train_data": Module(), "batch_size": None},
        *(TensorDataset(data.tensors[0] + 1, data.tensors[1]) for data in (points(), QUERIES)),
    ),
    "two loaders beside a dataset of queries": (
        {"train_data": TWO_LOADERS, "batch_size": None, "loss": row_losses},
        *(TensorDataset(2 * data.tensors[0], data.tensors[1]) for data in (points(), QUERIES)),
    ),
    "positions": ({"train_indices": CHOSEN}, TensorDataset(*points()[CHOSEN]), QUERIES),
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_data_of_all_kinds(name, together, tmp_path):
    how, data, queries = SOURCES[name]
    truth = ask(**how, trainer_fn=None if together else lambda: make_trainer(tmp_path))
    assert (truth.metadata["one_by_one_because"] is None) is (together and "loss" not in how)
    assert truth.masks.shape == (3, len(data))
    for number, losses in enumerate(truth.losses_by_seed):
        expected = by_hand(plain_net, data, queries, truth.masks, number, **HOW)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "task"), [("classes", "Classification()"), ("one logit", "BinaryClassification()")])
def test_losses_in_double_precision_and_of_other_tasks(name, task):
    kind, data, loss, measure = cases.NETWORKS[name]
    data, model = cases.in_double(data()), lambda: Net(kind(), sgd, loss).double()
    truth = ask(model, data, train_data=data)
    expected = by_hand(model, data, data, truth.masks, 0, measure=measure, **HOW).float()
    torch.testing.assert_close(truth.losses_by_seed[0], expected, rtol=1e-6, atol=1e-6)
    assert truth.metadata["task"] == task


def test_masks_of_zeros_and_ones_and_of_numpy():
    masks = cases.some_masks(2)
    for other in (masks.float(), masks.long(), masks.numpy()):
        truth = ask(masks=other)
        assert truth.masks.equal(masks)
        assert truth.losses_by_seed.equal(ask(masks=masks).losses_by_seed)


class Counting(Dataset):
    """Noise on every read; notes how the draws of an epoch differ."""

    def __init__(self, data):
        self.data, self.read = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        noise = torch.rand(1)
        self.read.append((i, float(noise)))
        return x + noise, y


@pytest.mark.filterwarnings("ignore:Two reads of one example")
def test_augmentation_draws_afresh_in_every_epoch_and_alike_for_all_subsets():
    data = Counting(points())
    ask(train_data=data, num_seeds=1, masks=cases.some_masks(2), memory_budget=1)
    epochs = [data.read[i : i + NUM_TRAIN] for i in range(len(data.read) - 4 * NUM_TRAIN, len(data.read), NUM_TRAIN)]
    draws = [dict(epoch) for epoch in epochs]
    assert [len(draw) for draw in draws] == [NUM_TRAIN] * 4
    assert draws[0] == draws[2]  # two models, two epochs each
    assert draws[1] == draws[3]
    assert all(draws[0][i] != draws[1][i] for i in range(NUM_TRAIN))
    assert len(set(draws[0].values())) == NUM_TRAIN


@pytest.mark.filterwarnings("ignore:Two reads of one example")
def test_augmentation_one_by_one_is_reproducible(tmp_path):
    def once(masks):
        data = Augmented(points())
        return ask(train_data=data, masks=masks, trainer_fn=lambda: make_trainer(tmp_path))

    masks = cases.some_masks(3)
    torch.testing.assert_close(once(masks[1:]).losses, once(masks).losses[1:])


# ---- mistakes ---------------------------------------------------------------------------------------------------

SAME = Net(mlp(), sgd)
SHARED = mlp()
MISTAKES = {
    "fraction 0": (
        {"fraction": 0},
        "`fraction` must be between 0 and 1 and leave some of the 25 training examples in and some out, got 0",
    ),
    "fraction 1": ({"fraction": 1.0}, "`fraction` must be between 0 and 1"),
    "fraction above 1": ({"fraction": 1.5}, "`fraction` must be between 0 and 1 .* got 1.5"),
    "fraction too small": ({"fraction": 0.01}, "`fraction` must be between 0 and 1"),
    "no subsets": ({"num_subsets": 0}, "`num_subsets` must be an integer of at least 2, got 0"),
    "no seeds": ({"num_seeds": 0}, "`num_seeds` must be an integer of at least 1, got 0"),
    "masks too short": (
        {"masks": torch.ones(3, 24)},
        r"`masks` must hold 0 and 1, in shape \(num_subsets, 25\).* \(3, 24\)",
    ),
    "one mask": ({"masks": torch.ones(25)}, r"`masks` must hold 0 and 1, in shape .* \(25,\)"),
    "weights": ({"masks": torch.full((3, 25), 0.5)}, "`masks` must hold 0 and 1"),
    "empty subset": ({"masks": torch.eye(26, 25)}, r"Every subset in `masks` needs an example, .*: \[25\]"),
    "masks and a number": ({"masks": torch.ones(3, 25), "num_subsets": 3}, "Give either `masks` or `num_subsets`"),
    "a negative seed": ({"seed": -1}, "`seed` must be an integer of at least 0, got -1"),
    "an optimizer": ({"optimizer": OPTIMIZER(mlp().parameters())}, "`optimizer` must be a func.* an instance of SGD"),
    "a model with arguments": ({"model": Net}, "`model_fn` must work without arguments.*Wrap it"),
    "a sampler with replacement": (
        {"train_data": DataLoader(points(), 9, sampler=RandomSampler(points(), replacement=True))},
        "sampler draws with replacement",
    ),
    "a query without number": (
        {"queries": TensorDataset(torch.full((2, 4), torch.nan), torch.zeros(2).long())},
        r"Query 0 has NaN in its loss under an untrained model, which must be finite: .*\. Likewise 1\.",
    ),
    "no epochs": ({"max_epochs": 0}, "`max_epochs` must be an integer of at least 1, got 0"),
    "half an epoch": ({"max_epochs": 0.5}, "`max_epochs` must be an integer"),
    "no batch size": ({"batch_size": None}, "do not say their batch size.*Pass a DataLoader"),
    "batch size 0": ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
    "measure": ({"measure": "margin"}, r"`measure` must be a function fn\(model, batch\).*got 'margin'. Leave it out"),
    "loss": ({"loss": nn.MSELoss()}, r"`loss` must be a function fn\(model, batch\).*got MSELoss. Leave it out"),
    "loss and task": (
        {"loss": row_losses, "task": Classification()},
        "`task` and `loss` both say what training minimised. Give only one",
    ),
    "own loss without a step": (
        {"model": mlp, "optimizer": OPTIMIZER, "task": OwnLoss()},
        r"The loss of Sequential cannot be computed: OwnLoss\(\) failed.*no attribute 'training_step'.*Pass `loss=fn`",
    ),
    "no labels": ({"queries": TensorDataset(cases.random(4, 4))}, "has no targets, so losses cannot be measured"),
    "the same model": ({"model": lambda: SAME}, "`model_fn` returned the same model, or the same parameters, twice"),
    "shared weights": ({"model": lambda: Net(SHARED, sgd)}, "the same parameters, twice"),
    "an instance": ({"model": SAME}, "`model_fn` must be a function .* got Net. Pass its class"),
    "no function": ({"model": "net"}, "`model_fn` must be a function .* got str"),
    "no module": ({"model": lambda: 3}, "`model_fn` must return a module, got int"),
    "no optimizer": ({"model": mlp}, "Sequential is no LightningModule, so its optimizer is unknown"),
    "optimizer that is none": ({"model": mlp, "optimizer": list}, "must return a torch optimizer, got list"),
    "unknown": (
        {"epochs": 3},
        r"retrain\(\) has no argument epochs\. Its arguments are: batch_size, device, .*, train_indices, trainer_fn\.",
    ),
    "task class": ({"task": Classification}, "`task` must be an instance of Task, got the class Classification"),
    "other task": ({"task": BinaryClassification()}, "Expected 3 target"),
    "nothing to train on": ({"train_data": TensorDataset(torch.zeros(0, 4))}, "`train_data` is empty"),
}


def test_options_are_typed_as_they_are_taken():
    taken = inspect.signature(Recipe).parameters
    assert {*Training.__annotations__} == {*taken} - {"model_fn", "queries", "train_data", "max_epochs"}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case):
    more, message = MISTAKES[case]
    with pytest.raises((ValueError, TypeError), match=message):
        ask(**more)


@pytest.mark.parametrize("way", ["together", "one by one"])
def test_training_that_diverges_names_subset_and_seed(way, tmp_path):
    """The third subset alone: it holds an example that makes training diverge."""
    x, y = numbers().tensors
    x[7] *= 1e12
    data, masks = TensorDataset(x, y), cases.some_masks(4)
    masks[:, 7] = False
    masks[2, 7] = True
    trainer = {"trainer_fn": lambda: make_trainer(tmp_path, max_epochs=4)} if way == "one by one" else {}
    how = {"train_data": data, "masks": masks, "seed": 5, "max_epochs": 4, "memory_budget": 1}
    message = r"subset 2 with seed 5 gave losses .* not finite for queries \[0, 1, 2\]\. Did training diverge\?"
    with pytest.raises(ValueError, match=message):
        ask(lambda: nn.Linear(4, 1), Subset(numbers(), range(3)), optimizer=OPTIMIZER, **how, **trainer)


# ---- two processes ----------------------------------------------------------------------------------------------

WAYS = {
    "together": {"num_subsets": 5, "memory_budget": 1},
    "one by one": {"model": lambda: Net(cases.Deciding(), sgd), "num_subsets": 3, "num_seeds": 1},
    "dropout": {"model": lambda: Net(mlp().append(nn.Dropout(0.3)), sgd), "num_subsets": 3, "memory_budget": 1},
}


def ask_in_each(number, port, folder):
    """What each of the two processes does; rank r leaves its results in ``rank{r}.pt``."""
    start(number, port)
    torch.distributed.init_process_group("gloo", rank=number, world_size=2)
    results = {"world": world_size()}
    for name, how in WAYS.items():
        results[name] = ask(**how).losses_by_seed
        results[name, "path"] = ask(path=folder / name, **how).losses_by_seed
        results[name, "parts left"] = [path.name for path in folder.iterdir() if path.name.endswith(".parts")]
        barrier()
        if number == 0:  # as if the run had been killed before it could delete its parts
            for part in ["plan", *(f"part={number}" for number in range(30))]:
                write_record(folder / f"{name}.parts", part, {}, {})
            (folder / f"{name}.parts" / ".part=1.part-1-ab").mkdir()
        barrier()
        results[name, "again"] = ask(path=folder / name, **how).losses_by_seed
        barrier()
        results[name, "left"] = sorted(path.name for path in folder.iterdir() if path.name.startswith(name))
    torch.save(results, folder / f"rank{number}.pt")
    barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    before = dict(os.environ)
    results = run_two(ask_in_each, tmp_path_factory.mktemp("two"))
    assert dict(os.environ) == before
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_what_one_gives(both, way):
    with cases.threads(1):
        alone = ask(**WAYS[way]).losses_by_seed
    for results in both:
        assert results["world"] == 2
        for key in (way, (way, "path"), (way, "again")):
            assert results[key].equal(alone), key
        assert results[way, "left"] == [way]
