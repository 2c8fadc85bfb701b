"""Runs of a callback by others than lightning's Trainer: LightningCLI, and the package ``pytorch_lightning``."""

import sys
import warnings
from textwrap import indent

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from tests.helpers.models import Data, Validated, build, loader

CONFIG = """\
seed_everything: 0
trainer:
  max_epochs: 1
  accelerator: cpu
  devices: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: {folder}
  callbacks:
{callback}
"""


class Wide(Validated):
    """A model whose constructor the command line can fill in."""

    def __init__(self, width: int = 8):
        super().__init__(width=width)


def write_config(folder, callback):
    """The file of a config whose Trainer has this callback, an item of a YAML list."""
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("{callback}", indent(callback.strip(), 4 * " ")).format(folder=folder))
    return path


def run_cli(monkeypatch, folder, *arguments):
    """Run the command line with these arguments in a folder; returns what LightningCLI made."""
    cli = pytest.importorskip("lightning.pytorch.cli")
    pytest.importorskip("jsonargparse")
    # Lightning 2.6 calls names that jsonargparse 4.53 calls old.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return cli.LightningCLI(Wide, Data, save_config_callback=None)


def callbacks_of(cli, kind):
    """Those of a kind that its Trainer has."""
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]


def fit_in_the_other_tree(callback, dataset, folder, lr=0.1):
    """One epoch of a linear model by SGD with ``pytorch_lightning``, whose classes are others; returns the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import has warnings of its own
        pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(4, 3)

        def forward(self, x):
            return self.network(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=lr)

    assert not issubclass(Other, L.LightningModule)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    model = build(Other)
    trainer = pl.Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False, default_root_dir=folder, **quiet
    )
    trainer.fit(model, loader(dataset))
    return model
