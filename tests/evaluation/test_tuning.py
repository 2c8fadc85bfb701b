"""What tune_damping() refuses."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning import tune_damping
from stride_lightning.retraining.ground_truth import GroundTruth
from tests.helpers.models import Classifier, build, classification_data

DATA = classification_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampings": []}, "`dampings` is empty: give at least one number"),
        ({"method": "grad-dot"}, r"method='grad-dot' has no damping\. Methods that have one: .*ekfac"),
    ],
)
def test_what_cannot_be_tuned(options, message):
    with pytest.raises(ValueError, match=message):
        tune_damping(build(Classifier), DATA, train_data=DATA, truth=None, show_progress=False, **options)


def raised(model, batch):
    return model(batch[0])[:, 0]


def test_a_measure_is_that_of_the_truth():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator)
    data, masks = TensorDataset(x, x.sum(1, keepdim=True)), torch.rand(12, 20, generator=generator) < 0.5
    values = torch.rand(1, 12, 20, generator=generator)
    truth = GroundTruth(masks, values, [0], {"measure": {"name": "raised", "direction": "raises"}})
    how = {"train_data": data, "truth": truth, "method": "diagonal", "dampings": [0.1, 1.0], "show_progress": False}
    assert tune_damping(nn.Linear(3, 1), data, measure=raised, **how).dampings == (0.1, 1.0)
    with pytest.raises(ValueError, match="explains what lowers loss, but the ground truth measures what raises raised"):
        tune_damping(nn.Linear(3, 1), data, **how)
