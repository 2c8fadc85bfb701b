"""Which training digits made the model read a test digit as it does?

The script trains a small network on scikit-learn's digits, with StrideCallback in the Trainer, and attributes 20 test
digits. Then it checks the scores by retraining: on random halves of the training set, and without the digits with the
highest scores. It takes under a minute on two CPU cores and writes TensorBoard events, pictures and the saved scores to
``runs/digits``.
"""

import logging
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import Attribution, StrideCallback, attribute, evaluate, retrain, retrain_without

OUTPUT = Path("runs/digits")
NUM_TRAIN, NUM_QUERIES, EPOCHS = 1000, 20, 30
NUM_SUBSETS, NUM_SEEDS = 100, 2


class DigitClassifier(L.LightningModule):
    """An ordinary LightningModule; nothing in it knows about attribution."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2)


def digits():
    """1000 training digits and 20 queries, as images of shape (1, 8, 8)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN : NUM_TRAIN + NUM_QUERIES]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def main():
    started = time.perf_counter()
    torch.set_num_threads(1)  # for a network this small a second thread only waits
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    train, queries = digits()

    L.seed_everything(0, verbose=False)
    model = DigitClassifier()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=[StrideCallback()],
        logger=TensorBoardLogger(OUTPUT.parent, name=OUTPUT.name),
        enable_model_summary=False,
    )
    loader = DataLoader(train, batch_size=100, shuffle=True)
    trainer.fit(model, loader)

    attribution = attribute(model, queries, train_data=train)
    print(f"\n{attribution}\n{attribution.metadata['record_note']}\n\n{attribution.top(5)}\n")

    folder = Path(trainer.log_dir)
    attribution.log(trainer.loggers)
    attribution.plot([0, 3, 6, 8], k=4).savefig(folder / "attribution.png", dpi=120)
    saved = attribution.save(folder / "scores")

    # The check: models trained from scratch in the same way, on different digits.
    how = {"train_data": loader, "max_epochs": EPOCHS, "num_seeds": NUM_SEEDS}
    truth = retrain(DigitClassifier, queries, num_subsets=NUM_SUBSETS, path=folder / "truth", **how)
    removed = retrain_without(attribution, DigitClassifier, queries, ks=[10, 50], **how)
    # The baseline that any method must beat: 1 for training digits of the query's class, else 0.
    same_class = Attribution(
        (train.tensors[1] == queries.tensors[1][:, None]).float(), metadata={"method": "same class"}
    )
    evaluation = evaluate([attribution, same_class], truth, counterfactuals={"stride": removed})
    evaluation.log(trainer)
    evaluation.plot().savefig(folder / "evaluation.png", dpi=120)

    print(f"{evaluation}\n")
    print(f"{NUM_SUBSETS * NUM_SEEDS} models were retrained on random halves in {truth.metadata['seconds']:.1f} s.")
    print(f"Training, attribution and retraining together took {time.perf_counter() - started:.0f} s.")
    print(f"Pictures: {folder / 'attribution.png'}, evaluation.png\nScores:   {saved}")
    print(f"Look:     tensorboard --logdir {OUTPUT}")


if __name__ == "__main__":
    main()
