"""Which training digits made the model read a test digit as it does?

Trains a small network on scikit-learn's digits with a Trainer that StrideCallback watches, attributes 20 test digits,
and then checks the scores the hard way: by retraining on random halves of the training set. Under a minute on two
CPU cores; writes TensorBoard events, a picture and the saved scores to ``runs/digits``.
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
from tqdm import tqdm

from stride_lightning import StrideCallback, attribute, linear_datamodeling_score

OUTPUT = Path("runs/digits")
NUM_TRAIN, NUM_QUERIES, EPOCHS = 1000, 20, 30
NUM_SUBSETS, NUM_SEEDS = 48, 2


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


def retrain(train, queries):
    """Losses of the queries under models trained from scratch on random halves: (masks, losses)."""
    images, labels = train.tensors
    generator = torch.Generator().manual_seed(1)
    halves = torch.stack([torch.randperm(NUM_TRAIN, generator=generator) < NUM_TRAIN // 2 for _ in range(NUM_SUBSETS)])
    losses = torch.zeros(NUM_SUBSETS, NUM_QUERIES)
    for mask, loss in zip(tqdm(halves, desc="Retraining on random halves"), losses, strict=True):
        for seed in range(NUM_SEEDS):
            # The same initialisation and batch order for every half: only the data differ.
            torch.manual_seed(seed)
            model = DigitClassifier()
            optimizer = model.configure_optimizers()
            for _ in range(EPOCHS):
                for batch in torch.randperm(NUM_TRAIN).split(100):
                    kept = batch[mask[batch]]
                    optimizer.zero_grad()
                    F.cross_entropy(model(images[kept]), labels[kept]).backward()
                    optimizer.step()
            with torch.no_grad():
                loss += F.cross_entropy(model(queries.tensors[0]), queries.tensors[1], reduction="none") / NUM_SEEDS
    return halves, losses


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
    trainer.fit(model, DataLoader(train, batch_size=100, shuffle=True))

    attribution = attribute(model, queries, train_data=train)
    print(f"\n{attribution}\n{attribution.metadata['record_note']}\n\n{attribution.top(5)}\n")

    folder = Path(trainer.log_dir)
    attribution.log(trainer.loggers)
    attribution.plot([0, 3, 6, 8], k=4).savefig(folder / "attribution.png", dpi=120)
    saved = attribution.save(folder / "scores")

    masks, losses = retrain(train, queries)
    score = linear_datamodeling_score(attribution.scores, masks, losses)
    seconds, everything = attribution.metadata["seconds"]["total"], time.perf_counter() - started
    print(f"\nLinear datamodeling score against {NUM_SUBSETS} random halves retrained: {score:.2f}")
    print(f"Attribution took {seconds:.1f} s, training, attribution and retraining together {everything:.0f} s.")
    print(f"Picture: {folder / 'attribution.png'}\nScores:  {saved}\nLook:    tensorboard --logdir {OUTPUT}")


if __name__ == "__main__":
    main()
