"""Every gradient method with a loss of the module's own: the scores that the likelihood of that loss gives."""

import lightning.pytorch as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import BinaryClassification, Classification, Regression, attribute, self_influence
from stride_lightning.tasks.own_loss import OwnLoss
from tests.helpers.gradient_models import EXACT, QUIET
from tests.helpers.own_losses import network
from tests.helpers.tiny import correlation, random_tensor

#: Methods that read gradients, with options that make them exact.
METHODS = EXACT | {"tracin": {}, "information-loss": {"ridge": 0.1}, "information-gain": {"ridge": 0.1}}
#: Torch's own, of the first forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")


class Trained(L.LightningModule):
    """A network with the loss of a likelihood."""

    def __init__(self, loss, num_outputs):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = network(num_outputs).double()
        self.loss = loss

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        outputs = self(batch[0])
        return self.loss(outputs if outputs.shape[1] > 1 else outputs[:, 0], batch[1])


def case(name, num, seed):
    """A loss, the likelihood that is the same, its number of outputs, and data."""
    x, generator = random_tensor(num, 4, seed=seed), torch.Generator().manual_seed(seed + 50)
    if name == "softmax":
        return F.cross_entropy, Classification(), 3, TensorDataset(x, torch.randint(3, (num,), generator=generator))
    if name == "binary":
        labels = torch.randint(2, (num,), generator=generator).double()
        return F.binary_cross_entropy_with_logits, BinaryClassification(), 1, TensorDataset(x, labels)
    half = Regression()  # squares are halved; with noise of this scale they are not
    one, num_outputs = Regression(noise_std=0.5**0.5), 2 if name == "two real outputs" else 1
    targets = random_tensor(num, num_outputs, seed=seed + 50)
    if name == "halved squares":
        return (lambda o, y: (o - y).square().mean() / 2), half, 1, TensorDataset(x, targets[:, 0])
    # Of two outputs torch takes the mean, a likelihood the sum.
    loss = F.mse_loss if num_outputs == 1 else lambda o, y: 2 * F.mse_loss(o, y)
    return loss, one, num_outputs, TensorDataset(x, targets[:, 0] if num_outputs == 1 else targets)


#: A margin between several classes has no counterpart in a loss of the module's own: TRAK has another unit there.
OTHER_UNITS = [("trak", "softmax"), ("trak-newton", "softmax")]
CASES = ["softmax", "binary", "squares", "halved squares", "two real outputs"]


def scores_of(model, train, queries, method, task, folder, **options):
    if method == "tracin":
        path = folder / "run.ckpt"
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.save(
            {"state_dict": model.state_dict(), "global_step": 3, "optimizer_states": [optimizer.state_dict()]}, path
        )
        options["record"] = path
    options = QUIET | METHODS[method] | options
    return attribute(model, queries, train_data=train, method=method, task=task, **options).scores


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_likelihood(method, name, tmp_path):
    loss, task, num_outputs, train = case(name, 20, 0)
    queries, model = case(name, 4, 1)[3], Trained(loss, num_outputs)
    expected = scores_of(model, train, queries, method, task, tmp_path)
    scores = scores_of(model, train, queries, method, OwnLoss(), tmp_path)
    assert correlation(scores, expected) >= 0.999
    if (method, name) not in OTHER_UNITS:
        torch.testing.assert_close(scores, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["softmax", "squares"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("grad-cos", "tracin")])
def test_self_influence_is_that_of_the_likelihood(method, name):
    loss, task, num_outputs, train = case(name, 20, 0)
    model, options = Trained(loss, num_outputs), {"train_data": train, "method": method} | QUIET | METHODS[method]
    expected = self_influence(model, task=task, **options)
    scores = self_influence(model, task=OwnLoss(), **options)
    if (method, name) not in OTHER_UNITS:
        torch.testing.assert_close(scores, expected, rtol=2e-3, atol=1e-6)
    assert correlation(scores, expected) >= 0.999


@pytest.mark.parametrize("method", ["information-loss", "information-gain"])
def test_signs_of_information(method):
    loss, task, num_outputs, train = case("softmax", 20, 0)
    queries, model = case("softmax", 4, 1)[3], Trained(loss, num_outputs)
    options = {"train_data": train, "method": method, "signed": True, "ridge": 0.1} | QUIET
    expected, scores = (attribute(model, queries, task=each, **options).scores for each in (task, OwnLoss()))
    assert (expected < 0).any()
    torch.testing.assert_close(scores, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
