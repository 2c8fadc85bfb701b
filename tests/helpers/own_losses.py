"""Modules whose loss is their own, each with the loss of one example written out by hand."""

from dataclasses import dataclass
from functools import partial

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stride_lightning import attribute
from stride_lightning.tasks.own_loss import OwnLoss
from tests.helpers.gradient_models import flat
from tests.helpers.tiny import random_tensor

QUIET = {"show_progress": False}


class Own(L.LightningModule):
    """The base: no optimizer is needed to be attributed."""

    #: Factor of each example's loss in a weighted mean, before weights are scaled to a mean of 1.
    def weight_of(self, example):
        return 1.0

    def loss_of(self, example):
        """The loss of one example, as the training set holds it, by hand."""
        raise NotImplementedError


def numbers(num, seed):
    """Four inputs and one real target."""
    return TensorDataset(random_tensor(num, 4, seed=seed), random_tensor(num, 2, seed=seed + 50))


def classes(num, seed, ignored=0):
    """Four inputs and one of three classes; every third of the ``ignored`` examples has none."""
    labels = torch.randint(3, (num,), generator=torch.Generator().manual_seed(seed + 50))
    if ignored:
        labels[1::ignored] = -100
    return TensorDataset(random_tensor(num, 4, seed=seed), labels)


def network(num_outputs=3, width=5):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, num_outputs))


# ---- means and sums -----------------------------------------------------------------------------------------------


class Absolute(Own):
    """L1, which no likelihood is."""

    data = staticmethod(numbers)

    def __init__(self):
        super().__init__()
        self.net = network(2)

    def training_step(self, batch, batch_idx):
        return F.l1_loss(self.net(batch[0]), batch[1])

    def loss_of(self, example):
        return (self.net(example[0]) - example[1]).abs().sum() / 2


class Summed(Absolute):
    def training_step(self, batch, batch_idx):
        return F.smooth_l1_loss(self.net(batch[0]), batch[1], reduction="sum")

    def loss_of(self, example):
        gap = (self.net(example[0]) - example[1]).abs()
        return torch.where(gap < 1, gap.square() / 2, gap - 0.5).sum()


class Penalised(Absolute):
    """A penalty on weights is no part of an example."""

    def training_step(self, batch, batch_idx):
        penalty = sum(weight.square().sum() for weight in self.parameters())
        return super().training_step(batch, batch_idx) + 0.1 * penalty


class InEval(Absolute):
    """Another term in training only, with a head of its own."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        hidden = torch.tanh(self.net[0](batch[0]))
        loss = F.l1_loss(self.net[2](hidden), batch[1])
        if self.training:
            loss = loss + 0.3 * F.huber_loss(self.aux(hidden), batch[1], delta=0.5)
        return loss

    def loss_of(self, example):
        gap = (self.aux(torch.tanh(self.net[0](example[0]))) - example[1]).abs()
        huber = torch.where(gap < 0.5, gap.square() / 2, 0.5 * (gap - 0.25)).mean()
        return super().loss_of(example) + 0.3 * huber


class Mixed(Absolute):
    """Mixup: the examples of a batch enter each other in training mode."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.training:
            order = torch.randperm(len(x))
            x, y = 0.7 * x + 0.3 * x[order], 0.7 * y + 0.3 * y[order]
        return F.l1_loss(self.net(x), y)


class MixedTargets(Absolute):
    """Targets alone are mixed, so that rows of the network stay those of examples."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self.net(x)
        loss = F.l1_loss(outputs, y)
        return 0.7 * loss + 0.3 * F.l1_loss(outputs, y.roll(1, 0)) if self.training else loss


class TiedMixed(Mixed):
    """Mixup where no module sees how a weight is used."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.training:
            x, y = 0.7 * x + 0.3 * x.roll(1, 0), 0.7 * y + 0.3 * y.roll(1, 0)
        return F.l1_loss(F.linear(self.net[:2](x), self.net[2].weight, self.net[2].bias), y)


class SkipsBad(Absolute):
    """Batches with an example that cannot be learned are left out, as of bad readings."""

    @staticmethod
    def data(num, seed):
        data = numbers(num, seed)
        data.tensors[1][2::6] = float("nan")
        return data

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if torch.isnan(loss) else loss

    def loss_of(self, example):
        loss = super().loss_of(example)
        return 0 * self.net[0].bias.sum() if torch.isnan(loss) else loss


class UsedTwice(Own):
    """A code enters the loss by itself and through a decoder."""

    data = staticmethod(numbers)

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), network(2)
        self.decoder[0] = nn.Linear(3, 5)

    def training_step(self, batch, batch_idx):
        code = self.encoder(batch[0])
        return F.l1_loss(self.decoder(code), batch[1]) + 0.2 * code.pow(4).mean()

    def loss_of(self, example):
        code = self.encoder(example[0])
        return (self.decoder(code) - example[1]).abs().mean() + 0.2 * code.pow(4).mean()


class Loop(Own):
    """A cell that is called once for each step, and a head for the last state."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 1)

    @staticmethod
    def data(num, seed):
        return TensorDataset(random_tensor(num, 3, 2, seed=seed), random_tensor(num, seed=seed + 50))

    def run(self, x):
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)[:, 0]

    def training_step(self, batch, batch_idx):
        return F.l1_loss(self.run(batch[0]), batch[1])

    def loss_of(self, example):
        return (self.run(example[0][None])[0] - example[1]).abs()


class EveryStep(Loop):
    """The head is called at every step too."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        state, loss = x.new_zeros(len(x), 3), 0.0
        for step in x.unbind(1):
            state = self.cell(step, state)
            loss = loss + F.l1_loss(self.head(state)[:, 0], y)
        return loss

    def loss_of(self, example):
        state, loss = example[0].new_zeros(1, 3), 0.0
        for step in example[0]:
            state = self.cell(step[None], state)
            loss = loss + (self.head(state)[0, 0] - example[1]).abs()
        return loss


class Siamese(Own):
    """One encoder, called for both sides of a pair."""

    def __init__(self):
        super().__init__()
        self.encoder = network()

    @staticmethod
    def data(num, seed):
        labels = torch.randint(2, (num,), generator=torch.Generator().manual_seed(seed + 50)).double()
        return TensorDataset(random_tensor(num, 4, seed=seed), random_tensor(num, 4, seed=seed + 9), labels)

    def codes(self, one, other):
        return self.encoder(one), self.encoder(other)

    def training_step(self, batch, batch_idx):
        one, other = self.codes(*batch[:2])
        distance = (one - other).norm(dim=1)
        return torch.where(batch[2] > 0, distance.square(), F.relu(1.5 - distance).square()).mean()

    def loss_of(self, example):
        distance = (self.encoder(example[0]) - self.encoder(example[1])).square().sum().sqrt()
        return distance**2 if example[2] else (1.5 - distance).clamp(min=0) ** 2


class ViewMajor(Siamese):
    """Both views in one call: all first ones, then all second ones."""

    def codes(self, one, other):
        return self.encoder(torch.cat([one, other])).chunk(2)


class PairMajor(Siamese):
    """Both views in one call: those of an example beside each other."""

    def codes(self, one, other):
        codes = self.encoder(torch.stack([one, other], 1).flatten(0, 1)).unflatten(0, (-1, 2))
        return codes[:, 0], codes[:, 1]


class Flattened(Own):
    """Rows of all examples and places in one head, ``(B*T, V)``."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    @staticmethod
    def data(num, seed):
        return TensorDataset(torch.randint(7, (num, 5), generator=torch.Generator().manual_seed(seed)))

    def training_step(self, batch, batch_idx):
        (words,) = batch
        hidden = torch.tanh(self.embedding(words[:, :-1])).reshape(-1, 4)
        return F.cross_entropy(self.head(hidden).clamp(max=0.4), words[:, 1:].reshape(-1))

    def loss_of(self, example):
        logits = self.head(torch.tanh(self.embedding(example[0][:-1]))).clamp(max=0.4)
        return F.nll_loss(logits.log_softmax(-1), example[0][1:])


class TiedFunction(Flattened):
    """The matrix of the embedding is used as a function's argument too, where no module sees it."""

    def training_step(self, batch, batch_idx):
        (words,) = batch
        hidden = torch.tanh(self.head(self.embedding(words[:, :-1])))[..., :4]
        logits = F.linear(hidden, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())

    def loss_of(self, example):
        hidden = torch.tanh(self.head(self.embedding(example[0][:-1])))[:, :4]
        return F.nll_loss((hidden @ self.embedding.weight.T).log_softmax(-1), example[0][1:])


class Manual(Absolute):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


# ---- batches of other forms ---------------------------------------------------------------------------------------


class Rows(Dataset):
    """Examples as a function makes them of those of another dataset."""

    def __init__(self, dataset, form):
        self.dataset, self.form = dataset, form

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, place):
        return self.form(self.dataset[place])


class ListOfDicts(Absolute):
    """Batches are lists of dictionaries, as of detection models."""

    collate = list

    @staticmethod
    def data(num, seed):
        return Rows(numbers(num, seed), lambda pair: dict(zip("xy", pair, strict=True)))

    def training_step(self, batch, batch_idx):
        x, y = (torch.stack([row[name] for row in batch]) for name in "xy")
        return F.l1_loss(self.net(x), y)

    def loss_of(self, example):
        return super().loss_of((example["x"], example["y"]))


@dataclass
class Bunch:
    """A batch of a user's own class."""

    x: torch.Tensor
    y: torch.Tensor

    def to(self, *where):
        return Bunch(self.x.to(*where), self.y.to(*where))


def bunch(pairs):
    return Bunch(*map(torch.stack, zip(*pairs, strict=True)))


class OfObjects(Absolute):
    collate = staticmethod(bunch)

    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)


# ---- weighted means -----------------------------------------------------------------------------------------------

CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


class ClassWeights(Own):
    data = staticmethod(classes)

    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).clamp(max=0.5), batch[1], CLASS_WEIGHTS)

    def loss_of(self, example):
        return -self.net(example[0]).clamp(max=0.5).log_softmax(0)[example[1]]

    def weight_of(self, example):
        return float(CLASS_WEIGHTS[example[1]])


class TiedWeights(ClassWeights):
    """No module sees how the head's weight is used, so each example is read by itself."""

    def training_step(self, batch, batch_idx):
        logits = F.linear(self.net[:2](batch[0]), self.net[2].weight, self.net[2].bias)
        return F.cross_entropy(logits.clamp(max=0.5), batch[1], CLASS_WEIGHTS)


class Ignored(ClassWeights):
    """A batch of which all are ignored has the loss NaN."""

    data = staticmethod(partial(classes, ignored=3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).clamp(max=0.5), batch[1])

    def loss_of(self, example):
        return super().loss_of((example[0], example[1].clamp(min=0)))

    def weight_of(self, example):
        return float(example[1] >= 0)


class Skipping(Ignored):
    """Such a batch is skipped."""

    def training_step(self, batch, batch_idx):
        counted = batch[1] >= 0
        if not counted.any():
            return None
        return F.cross_entropy(self.net(batch[0])[counted].clamp(max=0.5), batch[1][counted])


class Dropping(Skipping):
    """Ignored examples do not even enter the network, so its rows are not those of the batch."""

    def training_step(self, batch, batch_idx):
        counted = batch[1] >= 0
        return super().training_step([part[counted] for part in batch], batch_idx) if counted.any() else None


class ExampleWeights(Own):
    """A weight for each example, and a mean with these weights."""

    def __init__(self):
        super().__init__()
        self.net = network(2)

    @staticmethod
    def data(num, seed):
        weights = torch.rand(num, generator=torch.Generator().manual_seed(seed + 70), dtype=torch.float64) + 0.2
        return TensorDataset(*numbers(num, seed).tensors, weights)

    def training_step(self, batch, batch_idx):
        x, y, weights = batch
        return (weights * F.l1_loss(self.net(x), y, reduction="none").mean(1)).sum() / weights.sum()

    def loss_of(self, example):
        return (self.net(example[0]) - example[1]).abs().mean()

    def weight_of(self, example):
        return float(example[2])


class Texts(Own):
    """Texts of unequal lengths, padded; the loss is a mean over all tokens of a batch."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    @staticmethod
    def data(num, seed):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 6, (num,), generator=generator).tolist()
        return [torch.randint(1, 7, (length,), generator=generator) for length in lengths]

    @staticmethod
    def collate(texts):
        return nn.utils.rnn.pad_sequence(texts, batch_first=True)

    def training_step(self, batch, batch_idx):
        logits = self.head(torch.tanh(self.embedding(batch[:, :-1]))).clamp(max=0.4)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)

    def loss_of(self, example):
        logits = self.head(torch.tanh(self.embedding(example[:-1]))).clamp(max=0.4)
        return F.nll_loss(logits.log_softmax(-1), example[1:])

    def weight_of(self, example):
        return float(len(example) - 1)


MEANS = [
    Absolute,
    Summed,
    Penalised,
    InEval,
    Mixed,
    MixedTargets,
    TiedMixed,
    SkipsBad,
    UsedTwice,
    Loop,
    EveryStep,
    Siamese,
    ViewMajor,
    PairMajor,
    Flattened,
    TiedFunction,
    Manual,
    ListOfDicts,
    OfObjects,
]
WEIGHTED = [ClassWeights, Ignored, Skipping, Dropping, ExampleWeights, TiedWeights, Texts]


# ---- asking and checking ------------------------------------------------------------------------------------------


def built(cls, seed=0):
    """A module in double precision with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls().double()


def loader(cls, dataset, **options):
    """A loader of a dataset with the class's own ``collate_fn``."""
    return DataLoader(dataset, batch_size=4, collate_fn=getattr(cls, "collate", None), **options)


def ask(model, train, queries, method="grad-dot", **options):
    """Scores of datasets in the form of the module's class."""
    cls, options = type(model), QUIET | {"task": OwnLoss()} | options
    train, queries = loader(cls, train), loader(cls, queries)
    return attribute(model, queries, train_data=train, method=method, **options)


def gradients(model, examples, scale=None):
    """Gradients of the examples' losses, each times its weight over ``scale``, the mean of all by default."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    weights = torch.tensor([model.weight_of(example) for example in examples], dtype=torch.float64)
    rows = []
    for example in examples:
        with torch.enable_grad():
            slopes = torch.autograd.grad(model.loss_of(example), parameters, allow_unused=True)
        rows.append(flat(slopes, parameters))
    return torch.stack(rows) * (weights / (weights.mean() if scale is None else scale))[:, None]


def mean_weight(model, examples):
    return sum(model.weight_of(example) for example in examples) / len(examples)


def rows_of(dataset, places=None):
    """Examples of a dataset as a list."""
    return [dataset[place] for place in (range(len(dataset)) if places is None else places)]


def brute_force(model, train, queries):
    """Inner products of gradients that were taken one example after the other, shape ``(q, n)``."""
    train, queries = rows_of(train), rows_of(queries)
    return gradients(model, queries, mean_weight(model, train)) @ gradients(model, train).T
