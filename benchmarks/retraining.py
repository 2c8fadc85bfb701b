"""Many models at once against one at a time: seconds, memory and whether they end with the same losses.

Energy efficiency (UCI, 691 training examples, MLP 8-128-128-1, SGD): one model without each of 100 examples. Digits
(scikit-learn, 1000 training examples, MLP 64-128-10, SGD with momentum and weight decay): one model on each of 100
random halves. Each way makes the same optimizer steps from the same weights on the same batches:

* together: ``retrain()``
* plain loop: one model after the other, a few lines of torch that index tensors
* loop with DataLoader: the same with a DataLoader, as most people write it
* lean Trainer: a fresh Trainer for each, without logger, checkpoints, progress bar and summary
* default Trainer: a fresh Trainer for each, as it comes

    python benchmarks/retraining.py --energy energy_efficiency.npz

Without ``--energy`` only digits run. Each way is a process of its own. The Trainers train fewer models, and their time
is scaled. The floor is the time of the matrix products alone, at the speed that this machine reaches on them.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
import warnings

import lightning.pytorch as L
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning.retraining.one_by_one import train_alone
from stride_lightning.retraining.recipe import Recipe
from stride_lightning.retraining.retrain import retrain, sample_masks

WAYS = ("together", "plain loop", "loop with DataLoader", "lean Trainer", "default Trainer")
NUM_MODELS = 100


class Energy(L.LightningModule):
    sizes, batch_size = (8, 128, 128, 1), 128

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    @staticmethod
    def loss(outputs, targets):
        return F.mse_loss(outputs, targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.03)

    @staticmethod
    def data(path):
        stored = np.load(path)
        x, y = torch.tensor(stored["X"]).float(), torch.tensor(stored["y"])[:, :1].float()
        order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))
        test, train = order[:77], order[77:]
        x = (x - x[train].mean(0)) / x[train].std(0)
        y = (y - y[train].mean()) / y[train].std()
        return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])

    @staticmethod
    def masks(num_train):
        masks = torch.ones(NUM_MODELS, num_train, dtype=torch.bool)
        masks[range(NUM_MODELS), torch.linspace(0, num_train - 1, NUM_MODELS).long()] = False
        return masks


class Digits(Energy):
    sizes, batch_size = (64, 128, 10), 100

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    @staticmethod
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2)

    @staticmethod
    def data(path):
        digits = load_digits()
        x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        return (TensorDataset(x[part], y[part]) for part in (order[:1000], order[1000:1200]))

    @staticmethod
    def masks(num_train):
        return sample_masks(num_train, NUM_MODELS)


KINDS = {"energy": Energy, "digits": Digits}


def run_way(arguments, name, way):
    """Train all models one way, in this process; prints one line of JSON."""
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    kind, epochs = KINDS[name], arguments.epochs[name]
    train, queries = kind.data(arguments.energy)
    masks = kind.masks(len(train))
    loader = DataLoader(train, batch_size=kind.batch_size, shuffle=True)
    recipe = Recipe(kind, queries, train_data=loader, max_epochs=epochs)
    count = arguments.trainer_models if "Trainer" in way else NUM_MODELS
    # What a first call pays once (imports, tracing machinery) is not what a model costs; all ways are warmed alike.
    train_by(way, kind, train, queries, loader, recipe, masks[:4], 20 if way == "together" else 1)
    base, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    losses = train_by(way, kind, train, queries, loader, recipe, masks[:count], epochs)
    seconds = (time.perf_counter() - started) * NUM_MODELS / count
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    print(json.dumps({"seconds": seconds, "memory": memory, "losses": losses.tolist()}))


def train_by(way, kind, train, queries, loader, recipe, masks, epochs):
    """Losses of the queries under a model of every mask, shape (models, queries)."""
    recipe.max_epochs = epochs
    if way == "together":
        truth = retrain(
            kind, queries, train_data=loader, max_epochs=epochs, masks=masks, num_seeds=1, show_progress=False
        )
        assert truth.metadata["one_by_one_because"] is None
        return truth.losses
    if way == "lean Trainer":
        return torch.stack([train_alone(recipe, mask, 0) for mask in masks])
    if way == "default Trainer":
        with tempfile.TemporaryDirectory() as folder:
            recipe.trainer_fn = lambda: L.Trainer(max_epochs=epochs, default_root_dir=folder, accelerator="cpu")
            return torch.stack([train_alone(recipe, mask, 0) for mask in masks])
    return torch.stack([loop(kind, train, queries, recipe, mask, epochs, way) for mask in masks])


def loop(kind, train, queries, recipe, mask, epochs, way):
    """One model, trained by a loop of one's own."""
    model = recipe.initial_model(0)
    optimizer = model.configure_optimizers()
    for epoch in range(epochs):
        order = [batch[mask[batch]] for batch in recipe.order(0, epoch)]
        if way == "plain loop":
            batches = ((train.tensors[0][batch], train.tensors[1][batch]) for batch in order)
        else:
            batches = DataLoader(train, batch_sampler=[batch.tolist() for batch in order])
        for inputs, targets in batches:
            optimizer.zero_grad()
            kind.loss(model(inputs), targets).backward()
            optimizer.step()
    with torch.no_grad():
        inputs, targets = queries.tensors
        return recipe.losses(model, recipe.prepared(model, (inputs, targets)))


def floor(kind, epochs, num_train, threads):
    """Seconds of the matrix products alone, forward and backward."""
    torch.set_num_threads(threads)
    one, other = torch.randn(8 * threads, 128, 128), torch.randn(8 * threads, 128, 128)
    best = 1e9
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(20):
            torch.bmm(one, other)
        best = min(best, time.perf_counter() - started)
    rate = 20 * 8 * threads * 2 * 128**3 / best
    products = [a * b for a, b in zip(kind.sizes, kind.sizes[1:], strict=False)]
    multiplied = 2 * num_train * (3 * sum(products) - products[0])  # no gradient of the inputs
    return NUM_MODELS * epochs * multiplied / rate, rate


def compare(arguments, name):
    kind, epochs = KINDS[name], arguments.epochs[name]
    train, _ = kind.data(arguments.energy)
    seconds, rate = floor(kind, epochs, len(train), arguments.threads)
    what = "without one example each" if name == "energy" else "on random halves"
    print(f"\n{name}: {NUM_MODELS} models {what}, {epochs} epochs, {arguments.threads} threads")
    print(f"{'':<22} {'seconds':>8} {'together is':>12} {'MiB':>6}  largest relative difference of a model's loss")
    rows = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", name, way, *sys.argv[1:]]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
        rows[way] = row = json.loads(result.stdout.splitlines()[-1])
        ours, theirs = (torch.tensor(r["losses"])[: len(row["losses"])].mean(1) for r in (rows["together"], row))
        gap = ((theirs - ours).abs() / ours).max()
        times = row["seconds"] / rows["together"]["seconds"]
        print(f"{way:<22} {row['seconds']:8.2f} {f'{times:.1f} x':>12} {row['memory']:6.0f}  {gap:.1e}", flush=True)
    print(f"{'floor':<22} {seconds:8.2f} {seconds / rows['together']['seconds']:11.2f} x  at {rate / 1e9:.0f} GFLOP/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--energy", help="energy_efficiency.npz: X (768, 8) and y (768, 2)")
    parser.add_argument("--energy-epochs", type=int, default=50)
    parser.add_argument("--digits-epochs", type=int, default=30)
    parser.add_argument("--trainer-models", type=int, default=10, help="models that the Trainers really train")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.epochs = {"energy": arguments.energy_epochs, "digits": arguments.digits_epochs}
    if arguments.way:
        run_way(arguments, *arguments.way)
        return
    for name in ("energy", "digits") if arguments.energy else ("digits",):
        compare(arguments, name)


if __name__ == "__main__":
    main()
