"""Which training labels are wrong?

The script gives a tenth of scikit-learn's digits a wrong label, trains a small network on them, and sorts them by
suspicion: by their loss, and by self-influence (how much training on a digit helped the model with that very digit).
With weight decay, a first model does not learn the wrong labels, and their loss is high. A second model memorises them:
its final weights show little, its checkpoints along training show much. The script takes half a minute on two CPU cores
and writes pictures to ``runs/mislabelled``.
"""

import logging
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import func, nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning.attribute import self_influence
from stride_lightning.callbacks.tracin import TracInCallback
from stride_lightning.metrics import mislabel_detection
from stride_lightning.storage.records import read_record

OUTPUT = Path("runs/mislabelled")
NUM_TRAIN, NUM_WRONG, EPOCHS, EVERY_N_EPOCHS, SEED = 1000, 100, 200, 10, 0


class DigitClassifier(L.LightningModule):
    """An ordinary LightningModule; nothing in it knows about attribution."""

    def __init__(self, weight_decay):
        super().__init__()
        self.weight_decay = weight_decay
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=self.weight_decay)


def digits_with_wrong_labels():
    """Training digits with labels of which some are wrong, and the true labels."""
    data, generator = load_digits(), torch.Generator().manual_seed(SEED)
    train = torch.randperm(len(data.target), generator=generator)[:NUM_TRAIN]
    images, true = torch.tensor(data.images, dtype=torch.float32)[train, None] / 16, torch.tensor(data.target)[train]
    wrong = torch.randperm(NUM_TRAIN, generator=generator)[:NUM_WRONG]
    given = true.clone()
    given[wrong] = (true[wrong] + torch.randint(1, 10, (NUM_WRONG,), generator=generator)) % 10  # any other class
    return TensorDataset(images, given), true


def fit(train, name, weight_decay):
    """A trained model, and the weights that TracInCallback saved along the way."""
    L.seed_everything(SEED, verbose=False)
    model, callback = DigitClassifier(weight_decay), TracInCallback(every_n_epochs=EVERY_N_EPOCHS)
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[callback], logger=L.loggers.CSVLogger(OUTPUT, name=name), **quiet)
    trainer.fit(model, DataLoader(train, batch_size=100, shuffle=True))
    return model, [read_record(path).tensors("weights") for path in callback.records]


def ways_to_suspect(model, along, train):
    """Functions that give the suspicion of every training digit, by name."""
    images, labels = train.tensors

    def loss(weights):
        outputs = func.functional_call(model, weights, images).detach()
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    # The baselines: the loss needs no gradients. Its mean over training uses the same checkpoints as TracIn.
    ways = {"loss": lambda: loss(along[-1]), "mean loss": lambda: sum(map(loss, along)) / len(along)}
    for method in ("tracin", "grad-dot", "ekfac"):  # tracin finds its records through the trainer
        ways[method] = lambda name=method: self_influence(model, train_data=train, method=name, show_progress=False)
    return ways


def picture(suspicion, train, true, columns=10, rows=2):
    """The most suspicious digits, framed in red if the label is wrong, else in green."""
    figure = Figure(figsize=(columns * 0.8, rows * 1.12), dpi=150, layout="constrained")
    for axes, place in zip(figure.subplots(rows, columns).flat, suspicion.argsort(descending=True), strict=False):
        image, given = train[place]
        color = "#c4262e" if given != true[place] else "#1a7f37"
        axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"label {given}", color=color, fontsize=8, fontweight="bold", pad=3)
        axes.set_xlabel(f"truly {true[place]}", color="#656d76", fontsize=8, labelpad=2)
        axes.spines[:].set(color=color, linewidth=1.3)
    return figure


def main():
    torch.set_num_threads(1)  # for a network this small a second thread only waits
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    train, true = digits_with_wrong_labels()
    wrong = train.tensors[1] != true
    for name, weight_decay in {"regularised": 1e-2, "memorised": 0.0}.items():
        model, along = fit(train, name, weight_decay)
        learnt = (model(train.tensors[0]).argmax(1) == train.tensors[1])[wrong].sum()
        print(f"\n{name}: weight decay {weight_decay:g}; it has learnt {learnt} of the {NUM_WRONG} wrong labels")
        print(f"{'method':<11} AUROC  average precision  wrong in the top {NUM_WRONG}  seconds")
        for method, way in ways_to_suspect(model, along, train).items():
            started = time.perf_counter()
            suspicion, seconds = way(), time.perf_counter() - started
            auroc, precision = (mislabel_detection(suspicion, wrong, m) for m in ("auroc", "average_precision"))
            num_hits = wrong[suspicion.topk(NUM_WRONG).indices].sum()
            print(f"{method:<11} {auroc:.3f}  {precision:<17.3f}  {num_hits:<20}  {seconds:.2f}", flush=True)
            if method == "tracin":
                picture(suspicion, train, true).savefig(OUTPUT / f"{name}.png")
    print(f"\nMost suspicious by TracIn: {OUTPUT / 'regularised.png'}, memorised.png")


if __name__ == "__main__":
    main()
