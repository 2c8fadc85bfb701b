"""Which loss stands for training: what the user says is compared with training_step, or tried."""

import warnings

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stride_lightning import Classification, Regression, attribute
from stride_lightning.tasks.own_loss import OwnLoss
from tests.helpers.models import NUM_FEATURES, Classifier, Regressor, build, classification_data, regression_data


def ask(model, data, **options):
    return attribute(model, data, train_data=data, method="grad-dot", show_progress=False, **options)


class Weighted(Classifier):
    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets, torch.tensor([1.0, 2.0, 5.0]))


class Margin(Classifier):
    def loss(self, outputs, targets):
        return F.multi_margin_loss(outputs, targets)


@pytest.mark.parametrize("cls", [Weighted, Margin])
def test_a_task_that_is_not_what_training_minimises_is_named_once(cls):
    data = classification_data(20)
    expected = rf"training_step of {cls.__name__} minimises another loss than Classification\(\), which `task` says"
    with pytest.warns(UserWarning, match=expected) as caught:
        attribution = ask(build(cls), data, task=Classification())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = ask(build(cls).network, data, task=Classification())
    torch.testing.assert_close(attribution.scores, plain.scores)


@pytest.mark.parametrize(
    ("cls", "data", "task"),
    [
        (Classifier, classification_data(20), Classification()),
        (Classifier, classification_data(20), OwnLoss()),
        (Weighted, classification_data(20), Classification(class_weights=[1.0, 2.0, 5.0])),
        (Regressor, regression_data(20), Regression(noise_std=3.0)),  # another factor
    ],
    ids=["the same", "own", "weighted", "scaled"],
)
def test_a_task_that_agrees_is_taken_as_it_is(cls, data, task):
    attribution = ask(build(cls), data, task=task)
    assert attribution.metadata["task"] == repr(task)


def test_a_step_that_cannot_be_run_contradicts_no_task():
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("needs its Trainer")

    class Without(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(NUM_FEATURES, 3)

        def forward(self, x):
            return self.net(x)

    for model in (build(Broken), Without(), nn.Linear(NUM_FEATURES, 3)):
        assert ask(model, classification_data(20), task=Classification()).scores.shape == (20, 20)


def test_a_lightning_module_without_a_step_is_taken_by_its_shapes():
    class Without(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(NUM_FEATURES, 3)

        def forward(self, x):
            return self.net(x)

    assert "by the shapes" in ask(Without(), classification_data(20)).metadata["loss"]
