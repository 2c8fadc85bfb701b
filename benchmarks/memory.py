"""Peak memory of every method on a convolutional network of 105,866 parameters, at default settings.

2,000 random images of 28 x 28 pixels and 100 queries, two convolutions at full and half resolution. Each method runs in
a process of its own. ``reported`` is what the attribution says of its call; ``process`` is the peak of the process
(``/proc/self/status``, so Linux only) above what it held after all imports. Gold standards train for one epoch.

    python benchmarks/memory.py [method ...]
"""

import logging
import subprocess
import sys
import tempfile
import time
import warnings

import lightning.pytorch as L
import torch
from common.memory import proc_status
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import TracInCallback, attribute, methods

NUM_TRAIN, NUM_QUERIES = 2000, 100
OPTIONS = {
    "further-training": {"left_out": range(8)},
    "retraining": {"num_subsets": 8, "max_epochs": 1, "num_seeds": 1},
}


class Network(L.LightningModule):
    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
        convolutions += [nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def images(count):
    return TensorDataset(torch.randn(count, 1, 28, 28), torch.randint(0, 10, (count,)))


def run(method):
    """One line of the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, train, queries = Network(), DataLoader(images(NUM_TRAIN), 100, shuffle=True), images(NUM_QUERIES)
    options = dict(OPTIONS.get(method, {}))
    if method == "retraining":
        options["model_fn"] = Network
    if method == "tracin":
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        callback = TracInCallback(tempfile.mkdtemp())
        L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet).fit(model, train)
    held, started = proc_status("VmRSS"), time.perf_counter()
    attribution = attribute(model, queries, train_data=train, method=method, show_progress=False, **options)
    seconds, peak = time.perf_counter() - started, proc_status("VmHWM") - held
    reported = attribution.metadata["peak_memory_bytes"]
    print(f"{method:18s}{seconds:9.1f}{reported / 2**20:12.0f}{peak / 2**20:12.0f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run(sys.argv[2])
    else:
        print(f"{'method':18s}{'seconds':>9s}{'reported':>12s}{'process':>12s}   (MiB)", flush=True)
        for method in sys.argv[1:] or methods():
            subprocess.run([sys.executable, __file__, "--one", method], check=True)
