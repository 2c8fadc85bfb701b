"""Which digits should be labelled next?

Five of the ten classes of scikit-learn's digits are rare here. A small network learns from fifty labelled digits. Then
a budget of labels goes to the digits with most information about its weights (``attributor.coreset()``), to those
farthest from all labelled ones (k-centre greedy), to those with the least certain predictions, or to random ones.
Networks trained on the fifty and the chosen digits show which choice is best. The script takes half a minute on two CPU
cores, prints accuracies and draws them in ``runs/coreset``.
"""

import logging
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import InformationGainAttributor

OUTPUT = Path("runs/coreset")
NUM_LABELLED, NUM_RARE, BUDGETS, NUM_SEEDS, EPOCHS, SEED = 50, 12, (10, 25, 50, 100, 200), 3, 100, 0


class DigitClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def digits():
    """Labelled digits, a pool whose labels are hidden from the choice, and a test set in which no class is rare."""
    data, generator = load_digits(), torch.Generator().manual_seed(SEED)
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    test, rest = torch.randperm(len(labels), generator=generator).tensor_split([500])
    rest = torch.cat([rest[labels[rest] == digit][: NUM_RARE if digit > 4 else None] for digit in range(10)])
    rest = rest[torch.randperm(len(rest), generator=generator)]
    return [TensorDataset(images[part], labels[part]) for part in (rest[:NUM_LABELLED], rest[NUM_LABELLED:], test)]


def fit(train, seed):
    L.seed_everything(seed, verbose=False)
    model = DigitClassifier()
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=False, **quiet)
    trainer.fit(model, DataLoader(train, batch_size=len(train)))  # every step sees all digits
    return model


def k_centre(points, known, size):
    chosen, distance = [], torch.cdist(points, known).min(1).values
    while len(chosen) < size:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def orders_of_labelling(model, labelled, images, size):
    """Positions in the pool by method, in order of choice: one order for each seed."""
    outputs, (hidden, known) = model(images).detach(), (model.net[:3](x).detach() for x in (images, labelled))
    # Information does not depend on labels, so any will do: here the network's predictions.
    attributor = InformationGainAttributor(show_progress=False).fit(model, TensorDataset(images, outputs.argmax(1)))
    unsure = torch.distributions.Categorical(logits=outputs).entropy()
    chosen = {"information": attributor.coreset(size).places, "k-centre": k_centre(hidden, known, size)}
    orders = {name: [order] * NUM_SEEDS for name, order in (chosen | {"least sure": unsure.topk(size).indices}).items()}
    return orders | {"random": [torch.randperm(len(images)) for _ in range(NUM_SEEDS)]}


def main():
    torch.set_num_threads(1)  # for a network this small a second thread only waits
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    labelled, pool, test = digits()

    def accuracy(extra, seed):
        """Test accuracy of a network trained on the labelled digits and on ``extra`` positions of the pool."""
        images, labels = (torch.cat([labelled.tensors[i], pool.tensors[i][extra]]) for i in (0, 1))
        model = fit(TensorDataset(images, labels), seed)
        return float((model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean())

    print(f"{len(labelled)} digits have a label: accuracy {accuracy([], 0):.3f}. {len(pool)} more have none.\n")
    print("labels spent", *(f"{budget:>6}" for budget in BUDGETS), f"  of rare classes among {BUDGETS[-1]}")
    figure = Figure(figsize=(5, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    ways = orders_of_labelling(fit(labelled, 0), labelled.tensors[0], pool.tensors[0], BUDGETS[-1])
    for name, orders in ways.items():
        accuracies = [[accuracy(order[:budget], seed) for budget in BUDGETS] for seed, order in enumerate(orders)]
        curve = torch.tensor(accuracies).mean(0).tolist()
        rare = torch.stack([pool.tensors[1][order[: BUDGETS[-1]]] > 4 for order in orders]).float().mean()
        print(f"{name:<12}", *(f"{value:6.3f}" for value in curve), f"  {rare * BUDGETS[-1]:.0f}", flush=True)
        axes.plot(BUDGETS, curve, "o-", markersize=3, label=name)
    axes.set(xlabel="labels spent", ylabel="test accuracy")
    axes.legend(frameon=False)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT / "accuracy.png")
    print(f"\nDrawn in {OUTPUT / 'accuracy.png'}")


if __name__ == "__main__":
    main()
