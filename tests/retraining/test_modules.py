"""Models of both import trees, and models whose layers, schedules or callbacks wait for a Trainer."""

from typing import ClassVar

import lightning.pytorch as L
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import further_train, retrain
from stride_lightning.retraining.modules import build, overridden, tree_of
from tests.helpers.models import classification_data

DATA, QUERIES = classification_data(24), classification_data(5, seed=1)
TREES = pytest.mark.parametrize("tree", [L, pytorch_lightning], ids=["lightning", "pytorch_lightning"])


def module_of(tree):
    """A LightningModule of that tree, the same in both."""

    class Module(tree.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = self.make_layer()

        def make_layer(self):
            return nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3)

    return Module


class Waiting(ReduceLROnPlateau):
    """Notes every value of the metric."""

    seen: ClassVar[list[float]] = []

    def step(self, metrics, *args, **kwargs):
        self.seen.append(float(metrics))
        super().step(metrics, *args, **kwargs)


def plateau_of(tree, monitor="val_loss"):
    class Plateau(module_of(tree)):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = Waiting(optimizer, factor=0.1, patience=0, threshold=10.0)  # every epoch is a plateau
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    return Plateau


def data_of(tree, *, validation=True):
    class Data(tree.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(DATA, batch_size=8, shuffle=True)

    if validation:
        Data.val_dataloader = lambda self: DataLoader(QUERIES, batch_size=2)
    return Data()


def retrained(model_fn, data=None, **options):
    options = {"max_epochs": 3, "num_subsets": 2, "num_seeds": 1, "show_progress": False} | options
    data = DataLoader(DATA, batch_size=8, shuffle=True) if data is None else data
    return retrain(model_fn, QUERIES, train_data=data, **options)


@TREES
def test_both_trees_are_known(tree):
    module = module_of(tree)()
    assert tree_of(module) is tree
    assert tree_of(tree.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)) is tree
    assert tree_of(nn.Linear(1, 1)) is None
    assert overridden(module, ["setup", "validation_step", "training_step"]) == ["validation_step", "training_step"]


@TREES
@pytest.mark.parametrize("one_by_one", [False, True], ids=["together", "one by one"])
def test_modules_of_both_trees_are_retrained_alike(tree, one_by_one):
    expected = retrained(module_of(L)).losses
    truth = retrained(module_of(tree), one_by_one=one_by_one)
    torch.testing.assert_close(truth.losses, expected, rtol=1e-4, atol=1e-5)
    assert truth.metadata["one_by_one_because"] == ("one_by_one=True was given" if one_by_one else None)


@TREES
def test_a_trainer_of_either_tree_trains_a_plain_module(tree):
    def make_trainer():
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        return tree.Trainer(max_epochs=3, accelerator="cpu", enable_model_summary=False, **quiet)

    options = {"trainer_fn": make_trainer, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.3)}
    expected = retrained(lambda: nn.Linear(4, 3), optimizer=options["optimizer"]).losses
    torch.testing.assert_close(retrained(lambda: nn.Linear(4, 3), **options).losses, expected, rtol=1e-4, atol=1e-5)


@TREES
def test_modules_of_both_trees_are_trained_on(tree):
    def effects(kind):
        torch.manual_seed(0)
        options = {"batch_size": 8, "num_seeds": 2, "left_out": [0, 5], "show_progress": False}
        return further_train(kind(), QUERIES, train_data=DATA, **options).effects()

    torch.testing.assert_close(effects(module_of(tree)), effects(module_of(L)))


@TREES
def test_a_plateau_of_the_validation_loss(tree):
    """Models see the validation data of the data module, or their own, after every epoch."""
    kind = plateau_of(tree)

    class OwnData(kind):
        def val_dataloader(self):
            return DataLoader(QUERIES, batch_size=2)

    runs = []
    for model_fn, data in ((kind, data_of(tree)), (OwnData, None), (OwnData, data_of(tree, validation=False))):
        Waiting.seen = []
        runs.append((retrained(model_fn, data).losses, Waiting.seen))
    for losses, seen in runs:
        assert len(seen) == 2 * 3  # models and epochs
        assert losses.equal(runs[0][0])
        assert seen == runs[0][1]
    # The last value of each model is the mean loss of the queries under it.
    torch.testing.assert_close(torch.tensor(runs[0][1])[[2, 5]], runs[0][0].mean(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(runs[0][0], retrained(module_of(tree)).losses, atol=1e-3)  # the plateaus had an effect


@TREES
def test_a_plateau_without_validation_data_is_refused_in_our_words(tree):
    message = r"^Plateau needs a metric .*val_loss.*LightningDataModule with a val_dataloader.*`optimizer=`"
    for data in (None, data_of(tree, validation=False)):
        with pytest.raises(ValueError, match=message):
            retrained(plateau_of(tree), data)
    assert retrained(plateau_of(tree, monitor="loss")).losses.isfinite().all()


@TREES
def test_a_model_that_stops_early(tree):
    class Stopping(module_of(tree)):
        def configure_callbacks(self):
            return [tree.callbacks.EarlyStopping("val_loss", patience=0, min_delta=10.0)]

    expected = retrained(module_of(tree), max_epochs=2).losses  # the second epoch is no better by 10
    truth = retrained(Stopping, data_of(tree), max_epochs=4)
    torch.testing.assert_close(truth.losses, expected, rtol=1e-4, atol=1e-5)


@TREES
def test_layers_that_hooks_make(tree):
    class Configured(module_of(tree)):
        def make_layer(self):
            return None

        def configure_model(self):
            if self.layer is None:
                self.layer = nn.Linear(4, 3)

    class SetUp(Configured):
        configure_model = tree.LightningModule.configure_model

        def setup(self, stage):
            assert stage == "fit"
            self.layer = nn.Linear(4, 3)

    expected = retrained(module_of(tree)).losses
    together = retrained(Configured)
    assert together.metadata["one_by_one_because"] is None
    torch.testing.assert_close(together.losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(retrained(Configured, one_by_one=True).losses, expected, rtol=1e-4, atol=1e-5)
    alone = retrained(SetUp)
    assert "setup" in alone.metadata["one_by_one_because"]
    torch.testing.assert_close(alone.losses, expected, rtol=1e-4, atol=1e-5)


def test_a_setup_that_needs_its_trainer():
    class Counting(module_of(L)):
        def setup(self, stage):
            self.num_steps = self.trainer.estimated_stepping_batches

    class Waits(module_of(L)):
        def make_layer(self):
            return None

        def setup(self, stage):
            self.layer = nn.Linear(4, self.trainer.datamodule.num_classes)

    assert retrained(Counting).losses.isfinite().all()
    with pytest.raises(ValueError, match=r"^Waits has no parameters before a Trainer .*setup\(\) raised RuntimeError"):
        build(Waits)


def test_a_plain_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match=r"^ReLU has no parameters before a Trainer runs it. Make its layers in"):
        retrain(nn.ReLU, QUERIES, train_data=TensorDataset(*DATA.tensors), max_epochs=1, batch_size=8)
