"""Every method against retrained models: linear datamodeling score (LDS), seconds, memory and damping in one table.

Protocol. A truth file (``.npz``, see ``common/truth.py``): data, an MLP with one hidden layer trained on them, random
half subsets and the losses of the queries under models retrained on those. The methods are those of ``attribute()``
that train no models of their own, with their defaults. Seconds are of the whole ``attribute()`` call; memory is the
peak of the resident set above what was there when it began; damping is relative to the mean eigenvalue of the
curvature. Every row is a process of its own.

TracIn needs checkpoints along training, which a truth file does not hold: the same MLP is trained as the models of the
truth were (SGD with learning rate .02, momentum .9, weight decay 1e-2, batches of 100, weights uniform in
+-1/sqrt(fan in); 15 epochs for mnist, else 30), with a TracInCallback in a Trainer. That is not in the seconds.

    STRIDE_TRUTH=../truth python benchmarks/methods.py --truth digits mnist
    python benchmarks/methods.py --truth digits.npz --methods ekfac,trak --sweep
    python benchmarks/methods.py --truth cnn_mnist --methods ekfac,trak-newton --residuals readout

``--sweep`` adds, for each method with a damping, the LDS over a grid of them, the default in brackets: what a better
choice would have brought.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from common.memory import start_meter
from common.truth import load, load_retrained
from torch import nn
from torch.utils.data import DataLoader

from stride_lightning import attribute, linear_datamodeling_score
from stride_lightning.attribute import create, methods
from stride_lightning.callbacks.tracin import TracInCallback

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
EPOCHS = {"mnist": 15}
RETRAINING = {"further-training", "retraining"}  # these train models, and are what others are measured by


class Classifier(L.LightningModule):
    """An MLP, trained as the models of the truth were."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2)


def method_names():
    return ["stride", *(name for name in methods() if name not in {"stride", *RETRAINING})]


def default_damping(method):
    return getattr(create(method), "damping", None)


def find_truth(name):
    """The file of that path, or of that name in the folder ``STRIDE_TRUTH``."""
    folder = os.environ.get("STRIDE_TRUTH")
    places = [Path(name), *([Path(folder) / name, Path(folder) / f"{name}.npz"] if folder else [])]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        setting = f"which is {folder}" if folder else "which is not set"
        raise argparse.ArgumentTypeError(
            f"no truth file {name!r}. Expected the path of an .npz file, or the name of one (digits for digits.npz) in "
            f"the folder that the environment variable STRIDE_TRUTH names, {setting}."
        )
    return file


# ---------------------------------------------------------------- in processes of their own


def train_along(arguments):
    """Train the truth's MLP from scratch and leave a record of every epoch in a folder."""
    model, train, _ = load(arguments.truth[0])
    if len(model) > 3:
        raise ValueError("checkpoints are made for MLPs only")
    torch.manual_seed(arguments.seed)
    for layer in (model[0], model[2]):
        layer.reset_parameters()  # uniform in +-1/sqrt(fan in), weights and biases
    trainer = L.Trainer(
        max_epochs=arguments.epochs or EPOCHS.get(arguments.truth[0].stem, 30),
        callbacks=[TracInCallback(arguments.records)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(model), DataLoader(train, batch_size=100, shuffle=True))


def run_row(arguments, method, dampings):
    """One method at each of some dampings (None for its default); prints one line of JSON for each."""
    data = *load(arguments.truth[0]), *load_retrained(arguments.truth[0])
    for damping in dampings:
        try:
            row = measure(arguments, method, damping, *data)
        except (TypeError, ValueError, RuntimeError) as error:  # such as a curvature that is singular at this damping
            row = {"failed": str(error).partition("\n")[0]}
        print(json.dumps(row), flush=True)


def measure(arguments, method, damping, model, train, queries, masks, losses):
    options = {} if damping is None else {"damping": damping}
    if arguments.residuals is not None:
        options["residuals"] = arguments.residuals
    if method == "tracin":
        options["record"] = arguments.records
    model = Classifier(model)
    peak_memory, started = start_meter(), time.perf_counter()
    attribution = attribute(
        model, queries, train_data=train, method=method, seed=arguments.seed, show_progress=False, **options
    )
    seconds, memory = time.perf_counter() - started, peak_memory() / 2**20
    known = attribution.metadata
    lds = float(linear_datamodeling_score(attribution.scores, masks, losses))
    return {"lds": lds, "seconds": seconds, "memory": memory, "damping": known["options"].get("damping")}


# ---------------------------------------------------------------- in this process


def child(arguments, truth, records, *more):
    """What this script prints with other arguments, line by line as it comes."""
    command = [sys.executable, __file__, "--truth", str(truth), "--threads", str(arguments.threads)]
    command += ["--seed", str(arguments.seed), "--records", str(records), *more]
    command += ["--epochs", str(arguments.epochs)] if arguments.epochs else []
    command += ["--residuals", arguments.residuals] if arguments.residuals else []
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode:
        yield {"failed": f"status {process.returncode}: {said[-1] if said else 'it said nothing'}"}


def compare(arguments, truth):
    """The tables of one truth; returns the methods that failed."""
    failed = []
    with tempfile.TemporaryDirectory() as records:
        print(f"\n{truth.stem}\n{'method':<16} {'LDS':>6} {'seconds':>8} {'MiB':>7} {'damping':>8}", flush=True)
        for method in arguments.methods:
            given = arguments.damping if default_damping(method) is not None else None
            rows = list(child(arguments, truth, records, "--train")) if method == "tracin" else []
            rows += [] if rows else child(arguments, truth, records, "--row", json.dumps([method, [given]]))
            row = rows[-1]
            if "failed" in row:
                failed.append(method)
                print(f"{method:<16} failed: {row['failed']}", flush=True)
                continue
            damping = "-" if row["damping"] is None else f"{row['damping']:.3g}"
            print(f"{method:<16} {row['lds']:6.3f} {row['seconds']:8.2f} {row['memory']:7.0f} {damping:>8}", flush=True)
        damped = [method for method in arguments.methods if default_damping(method) is not None]
        if arguments.sweep and damped:
            failed += sweep(arguments, truth, records, damped)
    return failed


def sweep(arguments, truth, records, methods):
    """LDS over the grid, and how far the default is below the best of it; returns the methods whose default fails."""
    failed, defaults = [], {method: default_damping(method) for method in methods}
    grid = sorted({*DAMPINGS, *defaults.values()})
    print(f"\n{truth.stem}: LDS by damping, that of the default in brackets\n{'method':<16}", end="")
    print("".join(f"{damping:>9g}" for damping in grid), "  below the best", flush=True)
    for method, default in defaults.items():
        by_damping = {}
        print(f"{method:<16}", end="", flush=True)
        rows = child(arguments, truth, records, "--row", json.dumps([method, grid]))
        for damping, row in zip(grid, rows, strict=False):
            if "lds" in row:
                by_damping[damping] = row["lds"]
            text = f"{row['lds']:.3f}" if "lds" in row else "-"
            print(f"{f'[{text}]' if damping == default else text:>9}", end="", flush=True)
        if default in by_damping:
            print(f"   {max(by_damping.values()) - by_damping[default]:.3f}", flush=True)
        else:
            failed.append(method)
            print("   the default failed", flush=True)
    return failed


def some_methods(text):
    names = text.split(",")
    unknown = [name for name in names if name not in method_names()]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}. Known: {', '.join(method_names())}.")
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--truth", required=True, nargs="+", type=find_truth, help="truth files, or names of some in $STRIDE_TRUTH"
    )
    parser.add_argument("--methods", type=some_methods, default=method_names(), help="separated by commas; all")
    parser.add_argument("--damping", type=float, help="of all methods that have one, in place of their defaults")
    parser.add_argument("--residuals", choices=("model", "readout"), help="of gradient methods that have the option")
    parser.add_argument("--sweep", action="store_true", help="also the LDS over a grid of dampings")
    parser.add_argument("--epochs", type=int, help="of the training that TracIn's checkpoints come from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    if arguments.train:
        train_along(arguments)
    elif arguments.row is not None:
        run_row(arguments, *arguments.row)
    else:
        failed = [method for truth in arguments.truth for method in compare(arguments, truth)]
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
