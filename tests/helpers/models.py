"""Tiny models and data sets that the integration tests share."""

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stride_lightning import Classification

NUM_TRAIN, NUM_QUERIES, NUM_FEATURES = 60, 6, 4


class Tiny(L.LightningModule):
    """A network, a loss and SGD; everything a Trainer needs and nothing that knows of attribution."""

    loss = staticmethod(F.cross_entropy)

    def __init__(self, network, lr=0.1):
        super().__init__()
        self.network, self.lr = network, lr

    def forward(self, inputs):
        return self.network(inputs)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = self.loss(self(inputs).float(), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Classifier(Tiny):
    def __init__(self, num_features=NUM_FEATURES, width=8, num_classes=3, dropout=0.0, lr=0.1):
        middle = [nn.Linear(num_features, width), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
        super().__init__(nn.Sequential(*middle, nn.Linear(width, num_classes)), lr)


class Validated(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))


class OfTwoLoaders(Classifier):
    """A batch of two loaders."""

    def training_step(self, batch, batch_idx):
        return sum(Classifier.training_step(self, part, batch_idx) for part in batch.values() if part is not None)


class ConvNet(Tiny):
    """Convolution, BatchNorm and dropout on 1 x 6 x 6 pictures."""

    def __init__(self):
        conv = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        super().__init__(nn.Sequential(*conv, nn.Dropout(0.3), nn.Linear(16, 2)))


class Regressor(Tiny):
    """One real output of shape ``(B,)``."""

    loss = staticmethod(F.mse_loss)

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)), lr=0.02)


class BinaryClassifier(Tiny):
    """One logit of shape ``(B,)``; integer targets."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)))

    def loss(self, logits, targets):
        return F.binary_cross_entropy_with_logits(logits, targets.float())


def points(num=NUM_TRAIN, num_features=NUM_FEATURES, seed=0):
    return torch.randn(num, num_features, generator=torch.Generator().manual_seed(seed))


def classification_data(num=NUM_TRAIN, seed=0, num_classes=3):
    """Classes told by the sign pattern of the first two features, a tenth of them wrong."""
    x = points(num, seed=seed)
    y = ((x[:, 0] > 0).long() + (x[:, 1] > 0).long()) % num_classes
    y[::10] = (y[::10] + 1) % num_classes
    return TensorDataset(x, y)


def regression_data(num=NUM_TRAIN, seed=0):
    x = points(num, seed=seed)
    return TensorDataset(x, x[:, 0] - 2 * x[:, 1] + 0.1 * points(num, 1, seed + 1)[:, 0])


def binary_data(num=NUM_TRAIN, seed=0):
    x = points(num, seed=seed)
    return TensorDataset(x, (x[:, 0] + 0.5 * x[:, 1] > 0).long())


def picture_data(num=40, seed=0):
    """Noise with a bright half, left or right."""
    x, y = points(num, 36, seed).reshape(num, 1, 6, 6), torch.arange(num) % 2
    x[y == 0, :, :, :3] += 1
    x[y == 1, :, :, 3:] += 1
    return TensorDataset(x, y)


class Changed(Dataset):
    """The examples of another data set, changed whenever they are read."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.changed(*self.dataset[i])


class Dicts(Changed):
    """Dictionaries."""

    def changed(self, x, y):
        return {"features": x, "answer": y}


class DictTask(Classification):
    """Reads them."""

    def inputs(self, batch):
        return batch["features"]

    def targets(self, batch):
        return batch["answer"]


class DictClassifier(Classifier):
    """Trains on them."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["features"], batch["answer"]), batch_idx)


class Augmented(Changed):
    """Noise on every read."""

    def changed(self, x, y):
        return x + 0.1 * torch.randn_like(x), y


class Data(L.LightningDataModule):
    """Training, validation and test data; counts what is asked of it."""

    def __init__(self, train=None, test=None):
        super().__init__()
        self.given, self.calls = (train, test), []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(stage)
        self.train = classification_data() if self.given[0] is None else self.given[0]
        self.held_out = classification_data(NUM_QUERIES, seed=1) if self.given[1] is None else self.given[1]

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.held_out, batch_size=4)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*(t[:4] for t in self.held_out.tensors)), batch_size=4)


def make_trainer(folder, *callbacks, **options):
    """A quiet Trainer on the CPU that keeps its files in one folder."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": folder}
    return L.Trainer(**(defaults | quiet | options), callbacks=list(callbacks))


def loader(dataset, batch_size=16, shuffle=True):
    """Batches in an order that depends on the global seed alone."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


def train(model, dataset, folder, *callbacks, seed=0, ckpt_path=None, **options):
    """Seed everything, fit, and return the trainer."""
    torch.manual_seed(seed)
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.fit(model, dataset if hasattr(dataset, "batch_sampler") else loader(dataset), ckpt_path=ckpt_path)
    return trainer


def build(kind, seed=0, **options):
    """A model with reproducible weights."""
    torch.manual_seed(seed)
    return kind(**options)


def hooks_of(model):
    """Every forward hook on any module."""
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
