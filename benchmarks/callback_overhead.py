"""What StrideCallback and TracInCallback cost per training step.

Protocol. Blocks of 200 training steps on a real Trainer with a TensorBoard logger, in turn without and with the
callback (and the other way round in every second pair), each a fresh fit of the same model; time runs from the start of
the first batch to the end of the last one, so sampling and logging of statistics are in it and the record at the end,
printed separately, is not. TracInCallback is asked to save after more steps than there are, so that it watches every
step and epoch and writes one record, at the end. The ratio of each pair is taken; the median of the pairs and a
bootstrap interval of that median are printed.
"""

import argparse
import logging
import tempfile
import time
import warnings

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import StrideCallback
from stride_lightning.callbacks.tracin import TracInCallback

#: name: (hidden width, batch size). The large step takes 20 ms or more on two cores.
MODELS = {"tiny MLP": (64, 32), "medium MLP": (512, 64), "large MLP": (1536, 512)}
CALLBACKS = {
    "stride": StrideCallback,
    "tracin": lambda: TracInCallback(every_n_epochs=10**6, every_n_train_steps=10**6),
}
FEATURES, CLASSES = 256, 10


class Classifier(L.LightningModule):
    def __init__(self, hidden):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class StepTimer(L.Callback):
    """Seconds from the first batch's start to the last one's end, and of what the end of training takes."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ended = time.perf_counter()


def block(hidden, batch_size, steps, callback, folder):
    torch.manual_seed(0)
    examples = TensorDataset(torch.randn(2048, FEATURES), torch.randint(CLASSES, (2048,)))
    timer = StepTimer()
    trainer = L.Trainer(
        max_steps=steps,
        # The timer goes first: what the callback does at the start of a batch comes after the clock starts.
        callbacks=[timer, callback()] if callback is not None else [timer],
        logger=TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(hidden), DataLoader(examples, batch_size, shuffle=True))
    return (timer.ended - timer.started) / steps, time.perf_counter() - timer.ended


def pair(hidden, batch_size, steps, callback, folder, *, swapped):
    """Seconds without and with the callback."""
    order = (callback, None) if swapped else (None, callback)
    times = [block(hidden, batch_size, steps, watched, folder) for watched in order]
    return times[::-1] if swapped else times


def compare(name, hidden, batch_size, kind, arguments):
    callback = CALLBACKS[kind]
    with tempfile.TemporaryDirectory() as folder:
        block(hidden, batch_size, 20, callback, folder)  # warm-up
        times = np.array(
            [
                pair(hidden, batch_size, arguments.steps, callback, folder, swapped=number % 2 == 1)
                for number in range(arguments.blocks)
            ]
        )  # (blocks, without/with, step/end)
    ratios = times[:, 1, 0] / times[:, 0, 0]
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, 1), (0.025, 0.975))
    plain, watched = np.median(times[:, 0, 0]) * 1e3, np.median(times[:, 1, 0]) * 1e3
    print(
        f"{kind} {name:<10} {plain:8.3f} ms/step without, {watched:8.3f} with; ratio {np.median(ratios):.3f} "
        f"(95 % interval of the median {low:.3f} to {high:.3f}); record of 2048 examples at the end "
        f"{np.median(times[:, 1, 1] - times[:, 0, 1]):.2f} s",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--callbacks", nargs="+", choices=CALLBACKS, default=list(CALLBACKS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for kind in arguments.callbacks:
        for name in arguments.models:
            compare(name, *MODELS[name], kind, arguments)


if __name__ == "__main__":
    main()
