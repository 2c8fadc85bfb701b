"""The module's own loss in place of a likelihood, and the check that tells which of them it is: what both cost.

Protocol. An MLP, a CNN with BatchNorm and a small transformer, each trained by cross-entropy. ``gradients`` are the
per-example gradients of the training examples, read batch by batch. ``grad-dot`` and ``ekfac`` are whole
``attribute()`` calls with 64 queries: they look at the loss, plan and read the data too, which takes as long for few
examples as for many. Each is timed in turn with ``Classification()`` and with ``OwnLoss()`` (and the other way round in
every second pair). The ratio of each pair is taken; the median of the pairs and a bootstrap interval of that median are
printed. Memory is the peak of the resident set above that at the start of the call, each in a process of its own (Linux
only).

``check`` is the agreement check that finds the likelihood, or finds that there is none, for cross-entropy and for two
other losses. It is timed in turn with training steps on 64 examples (``training_step``, backward and a step of SGD) and
printed in units of these. All times are seconds of CPU, on one thread by default.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings

import lightning.pytorch as L
import numpy as np
import torch
from common.memory import start_meter
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import Classification, attribute
from stride_lightning.attribute import create
from stride_lightning.data.agreement import agree
from stride_lightning.data.sources import resolve_train_data
from stride_lightning.tasks.own_loss import OwnLoss
from stride_lightning.tasks.training_step import Moment

TASKS = {"likelihood": Classification, "own loss": OwnLoss}
METHODS = ("grad-dot", "ekfac")
CLASSES, NUM_QUERIES = 10, 64


def focal(outputs, labels):
    nats = F.cross_entropy(outputs, labels, reduction="none")
    return ((1 - torch.exp(-nats)) ** 2 * nats).mean()


def weighted(outputs, labels):
    return F.cross_entropy(outputs, labels, torch.linspace(0.5, 2, CLASSES))


LOSSES = {"cross-entropy": F.cross_entropy, "class weights": weighted, "focal loss": focal}


class Classifier(L.LightningModule):
    """A network, trained by one of the losses."""

    def __init__(self, net, loss=F.cross_entropy):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Block(nn.Module):
    """Attention and an MLP, each on top of a LayerNorm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):  # (B, T, D)
        parts = self.attention(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts)  # (B, heads, T, D / heads)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A class for each sequence of tokens."""

    def __init__(self, vocabulary=200, length=32, width=64, depth=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, tokens):  # (B, T)
        x = self.embedding(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))


def cnn():
    layers = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, CLASSES))


#: name: (network, inputs of n examples)
MODELS = {
    "MLP": (mlp, lambda n: torch.randn(n, 256)),
    "CNN, BatchNorm": (cnn, lambda n: torch.randn(n, 1, 16, 16)),
    "transformer": (Transformer, lambda n: torch.randint(200, (n, 32))),
}


def prepared(name, num_train):
    """A network, its training data and queries."""
    torch.manual_seed(0)
    network, inputs = MODELS[name]
    train, queries = (TensorDataset(inputs(n), torch.randint(CLASSES, (n,))) for n in (num_train, NUM_QUERIES))
    return network(), DataLoader(train, 64, shuffle=True), queries


def seconds(run):
    """Seconds of CPU, which other jobs on the machine change little."""
    started = time.process_time()
    run()
    return time.process_time() - started


def ratios(first, second, pairs):
    """Seconds of both, and the ratio of the second to the first, over pairs in alternating order."""
    seconds(first), seconds(second)  # warm-up
    times = []
    for number in range(pairs):
        order = (second, first) if number % 2 else (first, second)
        pair = [seconds(run) for run in order]
        times.append(pair[::-1] if number % 2 else pair)
    times = np.array(times)  # (pairs, 2)
    return np.median(times, 0), times[:, 1] / times[:, 0]


def median_and_interval(values):
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(draws, 1), (0.025, 0.975))
    return f"{np.median(values):5.2f} (95 % interval {low:.2f} to {high:.2f})"


def show(name, what, times, values, memory=""):
    print(
        f"{name:<15} {what:<10} {times[0]:8.3f} s likelihood, {times[1]:8.3f} s own loss; ratio "
        f"{median_and_interval(values)}{memory}",
        flush=True,
    )


def compare_gradients(name, arguments):
    model, train, queries = prepared(name, arguments.num_train)
    model = Classifier(model).eval()

    def reads(task):
        attributor = create("grad-dot", show_progress=False).fit(model, train, task())

        def run():
            for batch in attributor.reader.run():
                batch.loss()

        return run

    show(name, "gradients", *ratios(reads(Classification), reads(OwnLoss), arguments.pairs))
    for method in METHODS:

        def attributes(task, method=method):
            options = {"train_data": train, "method": method, "show_progress": False}
            return lambda: attribute(model, queries, task=task(), **options)

        compared = ratios(attributes(Classification), attributes(OwnLoss), arguments.pairs)
        peaks = [child(arguments, name, method, task) for task in TASKS]
        show(name, method, *compared, f"; memory {peaks[0]:.0f} and {peaks[1]:.0f} MiB")


def compare_check(name, arguments):
    network, train, _ = prepared(name, arguments.num_train)
    examples = resolve_train_data(train, None)
    batch = next(iter(train))
    for loss in LOSSES:
        model = Classifier(network, LOSSES[loss])
        optimizer = model.configure_optimizers()

        def steps(model=model, optimizer=optimizer):
            model.train()
            for _ in range(12):
                optimizer.zero_grad()
                model.training_step(batch, 0).backward()
                optimizer.step()

        agreement = None

        def check(model=model):
            nonlocal agreement
            step = OwnLoss().of(model.eval(), Moment())
            agreement = agree(model, examples, torch.device("cpu"), step, batch_size=256)

        times, values = ratios(steps, check, arguments.pairs)
        print(
            f"{name:<15} check of {loss:<13} {times[1]:7.3f} s, {median_and_interval(values * 12)} training steps; "
            f"result: {agreement.task or 'the own loss'}",
            flush=True,
        )


def child(arguments, name, method, task):
    """Peak memory of one call in MiB, in a process of its own."""
    command = [sys.executable, __file__, "--num-train", str(arguments.num_train)]
    command += ["--threads", str(arguments.threads), "--one", json.dumps([name, method, task])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_one(arguments, name, method, task):
    network, train, queries = prepared(name, arguments.num_train)
    options = {"train_data": train, "method": method, "task": TASKS[task](), "show_progress": False}
    few = {"train_data": TensorDataset(*train.dataset[:64]), "method": method, "show_progress": False}
    attribute(Classifier(network), queries, **few)  # loads what is loaded on first use
    peak_memory = start_meter()
    attribute(Classifier(network), queries, **options)
    print(json.dumps(peak_memory() / 2**20))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--num-train", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.one is not None:
        run_one(arguments, *arguments.one)
        return
    for name in arguments.models:
        compare_check(name, arguments)
        compare_gradients(name, arguments)


if __name__ == "__main__":
    main()
