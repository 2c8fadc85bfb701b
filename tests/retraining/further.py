"""Further training by a plain loop, and the models and calls that its tests share."""

import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from stride_lightning.retraining.batches import batch_order
from stride_lightning.retraining.further_training import further_train
from stride_lightning.runtime.randomness import mix
from tests.retraining.cases import Net, cross_entropies, sgd

BATCH, EPOCHS, SEEDS, LEFT_OUT = 9, [1, 3], [0, 1], [4, 0, 17, 24]


def spread_losses(outputs, targets):
    """A loss that is no likelihood: cross-entropy, and a penalty on the outputs."""
    return F.cross_entropy(outputs, targets, reduction="none") + 0.1 * outputs.square().mean(1)


def SPREAD(outputs, targets):
    return spread_losses(outputs, targets).mean()


def make_net(network, optimize=sgd, loss=F.cross_entropy, kind=Net):
    """In double precision, with the same weights every time."""
    torch.manual_seed(3)
    return kind(network(), optimize, loss).double()


def batches_of(data, **more):
    return DataLoader(data, BATCH, **({"shuffle": True} | more))


def ask(model, data, queries, **more):
    how = {"left_out": LEFT_OUT, "epochs": EPOCHS, "num_seeds": len(SEEDS), "show_progress": False}
    return further_train(model, queries, train_data=data, **(how | more))


def train_on(model, data, queries, place, seed, *, measure, step=None, mode=nn.Module.train, read=None, **how):
    """Losses of the queries after the epochs, trained on by a plain loop without the example at a place.

    ``read(seed, epoch)`` gives the inputs and targets of an epoch where they are not those of the data.
    """
    model, n = copy.deepcopy(model), len(data)
    optimizer, result, steps = how.get("optimizer", lambda m: m.optimize(m))(model), [], 0
    for epoch in range(EPOCHS[-1]):
        x, y = data.tensors if read is None else read(seed, epoch)
        mode(model)
        for batch in batch_order(n, BATCH, how.get("shuffle", True), how.get("drop_last", False), seed, epoch):
            torch.manual_seed(mix(seed, epoch, steps))  # dropout
            loss_of = partial(step or (lambda m, part: m.loss(m(part[0]), part[1])), model)
            loss = loss_of((x[batch], y[batch]))
            if place is not None:
                loss = loss - loss_of((x[[place]], y[[place]])) / n
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        if epoch + 1 in EPOCHS:
            with torch.no_grad():
                result.append(measure(model.eval()(queries.tensors[0]), queries.tensors[1]))
    return torch.stack(result)


def by_hand(model, data, queries, measure=cross_entropies, left_out=LEFT_OUT, **how):
    """Loss without the example minus loss with it, shape ``(seeds, epochs, examples, queries)``."""
    effects = []
    for seed in SEEDS:
        whole = train_on(model, data, queries, None, seed, measure=measure, **how)
        without = [train_on(model, data, queries, place, seed, measure=measure, **how) for place in left_out]
        effects.append(torch.stack(without, 1) - whole[:, None])
    return torch.stack(effects)


def check(result, expected, tolerance=1e-10):
    assert expected.abs().amax((0, 2, 3)).min() > 1e-4  # or this would show nothing
    assert result.effects_by_seed.dtype == torch.float64
    torch.testing.assert_close(result.effects_by_seed, expected, rtol=tolerance, atol=tolerance)


def frozen_statistics(model):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
