"""The further-training study (arXiv 2412.03906) on energy efficiency and concrete strength: which method, how long?

A final model (MLP F-128-128-1, SGD, 1000 epochs, batches of 128, squared error of standardised targets) is trained on
with and without each of 100 examples, at learning rate 0.03, under 20 orders of the batches. Scores of gradient methods
at the final weights are compared with that gold standard by the cosine per query, after each amount of training:

* Grad-Dot: inner product of the loss gradients of query and example
* Gauss-Newton: the same through the inverse of the mean Gauss-Newton matrix, damped by 1000 times the mean squared
  entry of the training gradients, in closed form

One final model gets all orders, seven others one: how much the figures depend on it is part of the answer.

    python benchmarks/further_training.py energy_efficiency.npz concrete.npz --picture further_training.png

``--folder`` keeps the gold standards; a run that was interrupted goes on from there.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import further_train
from stride_lightning.metrics import further_training_cosine

AMOUNTS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 350, 500)
NUM_LEFT_OUT, FINAL_EPOCHS, FURTHER_RATE = 100, 1000, 0.03
METHODS = {"Grad-Dot": "#c4262e", "Gauss-Newton": "#0969da"}


class Regressor(L.LightningModule):
    def __init__(self, num_features):
        super().__init__()
        hidden = [nn.Linear(num_features, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(128, 1))

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])


def load(path):
    """Training and test data, standardised on the training set; a tenth is for testing, as in the paper."""
    stored = np.load(path)
    x, y = torch.tensor(stored["X"]).float(), torch.tensor(stored["y"]).float()
    y = y[:, :1] if y.ndim == 2 else y[:, None]
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))
    num_test = -(-len(x) // 10)
    test, train = order[:num_test], order[num_test:]
    x, y = ((v - v[train].mean(0)) / v[train].std(0, correction=0) for v in (x, y))
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def train_final(train, seed, learning_rate):
    torch.manual_seed(seed)
    x, y = train.tensors
    model = Regressor(x.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for _ in range(FINAL_EPOCHS):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.mse_loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


def scores_of(model, train, queries, left_out):
    """Scores (queries, left out) of the gradient methods, and the norm of the full gradient."""
    parameters = {name: value.detach().double() for name, value in model.named_parameters()}

    def output(parameters, x):
        return functional_call(model, parameters, (x[None],))[0, 0]

    def jacobian(data):
        parts = vmap(grad(output), in_dims=(None, 0))(parameters, data.tensors[0].double())
        return torch.cat([part.flatten(1) for part in parts.values()], 1)

    def residuals(data):
        x, y = (tensor.double() for tensor in data.tensors)
        return functional_call(model, parameters, (x,))[:, 0] - y[:, 0]

    jac, jac_q = jacobian(train), jacobian(queries)
    res, res_q = 2 * residuals(train), 2 * residuals(queries)  # derivatives of the squared errors
    gradients = jac * res[:, None]
    damping = 1000 * gradients.square().mean()
    kernel = 2 / len(jac) * jac @ jac.T + damping * torch.eye(len(jac), dtype=jac.dtype)
    inner = jac_q @ jac.T
    through = torch.linalg.solve(kernel, inner, left=False)  # J_q (H + damping)^-1 J'
    weights = res_q[:, None] * res
    scores = {"Grad-Dot": inner * weights, "Gauss-Newton": through * weights}
    return {name: value[:, left_out] for name, value in scores.items()}, gradients.mean(0).norm().item()


def study(path, arguments):
    """Cosines (final models, amounts) of each method; prints the table of one data set."""
    name, (train, queries) = path.stem, load(path)
    left_out = torch.linspace(0, len(train) - 1, NUM_LEFT_OUT).long()
    amounts = [amount for amount in AMOUNTS if amount <= arguments.epochs]
    print(f"\n{name}: {len(train)} training examples, {len(queries)} queries, {NUM_LEFT_OUT} left out")
    print(f"{'final model (orders)':<22}{'test':>8}{'gradient':>9}  {'method':<14}", *(f"{a:>6}" for a in amounts))
    curves, norms = {method: [] for method in METHODS}, []
    for seed in range(arguments.final_models):
        model = train_final(train, seed, arguments.final_rate)
        with torch.no_grad():
            error = F.mse_loss(model(queries.tensors[0]), queries.tensors[1])
        orders = arguments.num_seeds if seed == 0 else 1
        started = time.perf_counter()
        gold = further_train(
            model,
            queries,
            train_data=DataLoader(train, batch_size=128, shuffle=True),
            epochs=amounts,
            left_out=left_out,
            num_seeds=orders,
            optimizer=partial(torch.optim.SGD, lr=FURTHER_RATE),
            path=None if arguments.folder is None else arguments.folder / f"{name}-{seed}",
        )
        seconds = time.perf_counter() - started
        scores, norm = scores_of(model, train, queries, left_out)
        norms.append(norm)
        for method, values in scores.items():
            cosines = [further_training_cosine(values, gold.effects(amount)).item() for amount in amounts]
            curves[method].append(cosines)
            head = f"{seed} ({orders})" if method == "Grad-Dot" else ""
            facts = f"{error:8.4f}{norm:9.3f}" if head else " " * 17
            print(f"{head:<22}{facts}  {method:<14}", *(f"{c:6.3f}" for c in cosines), flush=True)
            if method == "Grad-Dot" and seed == 0:
                print_by_seeds(gold, values, amounts[0])
        print(f"{'':<22}{seconds:.0f} s for {orders * (NUM_LEFT_OUT + 1)} runs of {amounts[-1]} epochs")
    for method, rows in curves.items():
        mean = torch.tensor(rows).mean(0)
        print(f"{'mean of final models':<41}{method:<14}", *(f"{c:6.3f}" for c in mean.tolist()))
    peaks = [max(row) for row in curves["Grad-Dot"]]
    print(
        f"peak of Grad-Dot over final models: {min(peaks):.3f} to {max(peaks):.3f}, mean {np.mean(peaks):.3f}; "
        f"Spearman with the norm of the gradient they stopped at: {spearmanr(peaks, norms).statistic:.2f}"
    )
    return amounts, curves


def print_by_seeds(gold, scores, amount):
    """The cosine after the least training, by the number of orders averaged over."""
    counts = [count for count in (1, 2, 5, 10, 20) if count <= len(gold.seeds)]
    effects = gold.effects_by_seed[:, gold.epochs.index(amount)]
    cosines = [further_training_cosine(scores, effects[:count].mean(0).T).item() for count in counts]
    shown = ", ".join(f"{count}: {cosine:.3f}" for count, cosine in zip(counts, cosines, strict=True))
    print(f"{'':<22}Grad-Dot after {amount} epoch by number of orders: {shown}")


def draw(studies, target):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(studies), 3.4), dpi=150)
    FigureCanvasAgg(figure)
    for axes, (name, (amounts, curves)) in zip(
        np.atleast_1d(figure.subplots(1, len(studies), sharey=True)), studies.items(), strict=True
    ):
        for method, rows in curves.items():
            for row in rows:
                axes.plot(amounts, row, color=METHODS[method], linewidth=0.7, alpha=0.35)
            axes.plot(amounts, np.mean(rows, 0), color=METHODS[method], linewidth=2.2, label=method)
        axes.set_xscale("log")
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("epochs of further training")
        axes.spines[["top", "right"]].set_visible(False)
        axes.axhline(0, color="#d0d7de", linewidth=0.8, zorder=0)
    figure.axes[0].set_ylabel("cosine with further training")
    figure.axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help=".npz with X and y; of several targets the first is used")
    parser.add_argument("--num-seeds", type=int, default=20, help="orders of batches for the first final model")
    parser.add_argument("--final-models", type=int, default=8)
    parser.add_argument("--final-rate", type=float, default=0.3, help="learning rate of the final training")
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="where to keep the gold standards")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    studies = {path.stem: study(path, arguments) for path in arguments.data}
    if arguments.picture:
        draw(studies, arguments.picture)


if __name__ == "__main__":
    main()
