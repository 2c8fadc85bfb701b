"""Further training on a loss of the module's own, against a plain loop: what leaving an example out takes away."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.retraining.batches import batch_order
from stride_lightning.retraining.own_steps import OwnSteps
from stride_lightning.runtime.randomness import mix
from stride_lightning.tasks.own_loss import OwnLoss
from tests.retraining.cases import NUM_TRAIN, Net, in_double, mlp, points
from tests.retraining.further import BATCH, EPOCHS, LEFT_OUT, SEEDS, ask, batches_of, make_net

WEIGHTS = torch.tensor([1.0, 2.0, 5.0]).double()
WEIGHTED = nn.CrossEntropyLoss(weight=WEIGHTS)
SUM = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)


class Penalised(Net):
    """A sum over examples, and a penalty on weights that belongs to none of them."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.05 * self.network[0].weight.square().sum()


class Pairwise(Net):
    """A loss of pairs of examples."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + torch.cdist(*2 * [self(batch[0])]).square().mean()


class Skipping(Net):
    """Examples of class 0 have no loss; a batch of them alone is skipped."""

    def training_step(self, batch, batch_idx):
        valid = batch[1] > 0
        return None if not valid.any() else super().training_step([value[valid] for value in batch], batch_idx)


class Counting(Net):
    """The same, but the others count as examples without a loss."""

    def training_step(self, batch, batch_idx):
        valid = batch[1] > 0
        return (valid * F.cross_entropy(self(batch[0]), batch[1], reduction="none")).mean() if valid.any() else None


class Mixing(Net):
    """Mixes the examples of a batch in training."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.training:
            x = 0.7 * x + 0.3 * x.flip(0)
        return SUM(self(x), y) / len(y)


def steps_of(kind, loss=F.cross_entropy, data=None, own=None):
    data = in_double(points()) if data is None else data
    return OwnSteps(OwnLoss() if own is None else own, make_net(mlp, loss=loss, kind=kind), Examples(data), BATCH)


KINDS = {
    "mean": (Net, nn.CrossEntropyLoss(label_smoothing=0.2)),
    "sum": (Net, SUM),
    "sum with a penalty": (Penalised, SUM),
    "weighted": (Net, WEIGHTED),
    "weighted by skipping": (Skipping, F.cross_entropy),
    "weighted by ignoring": (Net, nn.CrossEntropyLoss(ignore_index=0)),
    "mean with zeros": (Counting, F.cross_entropy),
    "coupled": (Pairwise, F.cross_entropy),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("is_sorted", [False, True], ids=["mixed", "sorted"])
def test_the_kind_of_a_loss(name, is_sorted):
    data = in_double(points())
    if is_sorted:  # the first batch holds one class alone
        order = data.tensors[1].argsort(stable=True)
        data = TensorDataset(*(tensor[order] for tensor in data.tensors))
    steps = steps_of(*KINDS[name], data=data)
    assert (steps.kind, steps.mode, steps.is_random) == (name.split()[0], "train", False)


def test_where_training_mixes_examples_eval_mode_is_taken():
    steps = steps_of(Mixing)
    assert (steps.kind, steps.mode) == ("mean", "eval")


def test_weights_have_mean_one_over_the_training_set():
    data = in_double(points())
    steps = steps_of(Net, WEIGHTED, data)
    weights = WEIGHTS[data.tensors[1]]
    factors = [steps.parts(place, 0)[0].factor for place in range(NUM_TRAIN)]
    torch.testing.assert_close(torch.tensor(factors).double(), weights / weights.mean(), rtol=1e-4, atol=0)


def test_an_example_that_training_ignores_has_no_part():
    data = in_double(points())
    steps = steps_of(Skipping, data=data)
    ignored = int((data.tensors[1] == 0).nonzero()[0])
    assert steps.parts(ignored, 0) == []


def shares(name, model, x, y, place, seed, epoch, size):
    """What leaving an example out subtracts, written out."""
    one, n = slice(place, place + 1), len(x)
    losses = F.cross_entropy(model(x[one]), y[one], reduction="none", label_smoothing=0.1 if "sum" in name else 0)[0]
    if name == "mean with zeros":
        return (y[place] > 0) * losses / n
    if name == "mean":
        return F.cross_entropy(model(x[one]), y[one], label_smoothing=0.2) / n
    if name.startswith("sum"):
        return size * losses / n
    if name == "weighted":
        return WEIGHTS[y[place]] / WEIGHTS[y].mean() * losses / n
    if name.startswith("weighted"):
        return (losses / (y > 0).double().mean() if y[place] > 0 else losses * 0) / n
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(mix(seed, epoch), 0)))
    others = order[order != place][: BATCH - 1]
    whole = torch.cat([torch.tensor([place]), others])

    def loss_of(places):
        outputs = model(x[places])
        return F.cross_entropy(outputs, y[places]) + torch.cdist(outputs, outputs).square().mean()

    return (BATCH * loss_of(whole) - (BATCH - 1) * loss_of(others)) / n


def query_losses(name, model, x, y, train):
    losses = F.cross_entropy(
        model(x), y, reduction="none", label_smoothing={"mean": 0.2}.get(name, 0.1 * ("sum" in name))
    )
    if name == "weighted":
        return WEIGHTS[y] / WEIGHTS[train[1]].mean() * losses
    if name == "mean with zeros":
        return (y > 0) * losses
    if name.startswith("weighted"):
        return (y > 0) * losses / (train[1] > 0).double().mean()
    return losses


@pytest.mark.parametrize("name", KINDS)
def test_effects_are_those_of_a_plain_loop(name):
    kind, loss = KINDS[name]
    model, (x, y) = make_net(mlp, lambda m: torch.optim.SGD(m.parameters(), lr=0.02), loss, kind), points().tensors
    x = x.double()
    queries = in_double(points(4, seed=1))
    measure = None
    if name in ("coupled", "sum with a penalty"):  # the loss of a query has more in it
        measure = lambda m, batch: -F.cross_entropy(m(batch[0]), batch[1], reduction="none")  # noqa: E731
    result = ask(model, batches_of(in_double(points())), queries, measure=measure, task=OwnLoss())

    def trained(place, seed):
        alone, values = copy.deepcopy(model), []
        alone.log = lambda *_: None
        optimizer = alone.configure_optimizers()
        for epoch in range(EPOCHS[-1]):
            for batch in batch_order(NUM_TRAIN, BATCH, True, False, seed, epoch):
                total = alone.training_step((x[batch], y[batch]), 0)
                if total is None:
                    continue
                if place is not None:
                    total = total - shares(name, alone, x, y, place, seed, epoch, len(batch))
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
            if epoch + 1 in EPOCHS:
                with torch.no_grad():
                    of = "none" if measure else name
                    values.append(
                        -measure(alone, queries.tensors)
                        if measure
                        else query_losses(of, alone, *queries.tensors, (x, y))
                    )
        return torch.stack(values)

    for number, seed in enumerate(SEEDS):
        whole = trained(None, seed)
        expected = torch.stack([trained(place, seed) - whole for place in LEFT_OUT], 1)
        assert expected.abs().max() > 1e-5
        largest = float(expected.abs().max())
        tolerance = 1e-4 if "weighted" in name else 1e-10  # weights are read off gradients in single precision
        torch.testing.assert_close(result.effects_by_seed[number], expected, rtol=tolerance, atol=tolerance * largest)
