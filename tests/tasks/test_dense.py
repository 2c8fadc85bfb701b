"""Classes of places and counts: losses, curvature and roots against autograd, and gradients of examples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import DenseClassification, PoissonRegression, Task, TokenClassification, attribute
from tests.helpers.gradient_models import QUIET, seeded
from tests.helpers.tiny import random_tensor

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
X = random_tensor(9, 1, 2, 3, seed=0)
MASKS = torch.bucketize(random_tensor(9, 2, 3, seed=1), torch.tensor([-0.5, 0.5]).double())
HOLES = MASKS.masked_fill(random_tensor(9, 2, 3, seed=2) > 0.6, -100)
HOLES[4] = -100


def test_the_loss_is_that_of_torch_for_each_reduction_and_order_of_axes() -> None:
    logits = random_tensor(9, 3, 2, 3, seed=3)
    losses = F.cross_entropy(logits, HOLES, reduction="none").flatten(1)
    counts = (HOLES >= 0).flatten(1).sum(1)
    for task in (DenseClassification("sum"), DenseClassification("mean"), DenseClassification(classes_last=True)):
        inputs = logits.movedim(1, -1) if task.classes_last else logits
        outputs = task.outputs(nn.Identity(), inputs)
        encoded = task.encode(task.targets((inputs, HOLES)), 3)
        expected = losses.sum(1) / (1 if task.reduction == "sum" else counts.clamp(min=1))
        torch.testing.assert_close(task.loss(outputs, encoded), expected)
        assert task.loss(outputs, encoded)[4] == 0


@pytest.mark.parametrize("task", [DenseClassification("sum"), DenseClassification()], ids=repr)
def test_curvature_of_places_equals_the_hessian(task: Task) -> None:
    outputs, direction = random_tensor(9, 6, 3, seed=3), random_tensor(9, 6, 3, seed=4)
    encoded = task.encode(task.targets((X, HOLES)), 3).double()
    curved = task.output_weights(encoded) * task.curvature(task.mean(outputs), direction)
    _, expected = torch.autograd.functional.hvp(lambda o: task.loss(o, encoded).sum(), outputs, direction)
    torch.testing.assert_close(curved, expected)


@pytest.mark.parametrize("task", [PoissonRegression(), PoissonRegression().with_scale(0.3)], ids=repr)
def test_counts_equal_torch(task: Task) -> None:
    outputs, counts = random_tensor(5, 3, seed=0), (random_tensor(5, 3, seed=1).abs() * 4).floor()
    encoded = task.encode(counts, 3)
    expected = F.poisson_nll_loss(outputs, counts, reduction="none").sum(1) * task.scale
    torch.testing.assert_close(task.loss(outputs, encoded), expected)
    torch.testing.assert_close(task.loss(outputs.T, encoded.T, dim=0), expected)
    (gradient,) = torch.autograd.grad(task.loss(outputs.requires_grad_(), encoded).sum(), outputs)
    torch.testing.assert_close(task.residual(task.mean(outputs), encoded), gradient)
    hessian = torch.stack(
        [
            torch.autograd.functional.hessian(lambda o, i=i: task.loss(o, encoded[i]), outputs[i].detach())
            for i in range(5)
        ]
    )
    mean, units = task.mean(outputs.detach()), torch.eye(3).double()
    columns = torch.stack([task.curvature(mean, unit.expand(5, 3)) for unit in units], 2)
    torch.testing.assert_close(columns, hessian)
    torch.testing.assert_close(task.curvature_diagonal(mean), hessian.diagonal(dim1=1, dim2=2))
    root = torch.stack([task.curvature_root(mean, unit.expand(5, 3)) for unit in units], 2)
    torch.testing.assert_close(root @ root.mT, hessian)


def test_the_constant_of_counts_is_near_the_mean_and_finite() -> None:
    task = PoissonRegression()
    counts = torch.tensor([[0.0, 4.0]]).repeat(1000, 1).double()
    constant = task.constant(counts)
    assert constant.isfinite().all()
    torch.testing.assert_close(constant[1].exp(), torch.tensor(4.0).double(), rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match=r"^Row 1 .* target -2, and a count must not be negative"):
        task.encode(torch.tensor([1.0, -2.0]), 1)


@pytest.mark.parametrize("task", [DenseClassification(), DenseClassification("sum", normalised=True)], ids=repr)
def test_gradients_of_pictures_are_those_of_their_pixels(task: DenseClassification) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)))
    data = TensorDataset(X, HOLES)
    scores = attribute(model, data, train_data=data, task=task, method="grad-dot", batch_size=4, **QUIET).scores
    counts, rows = (HOLES >= 0).flatten(1).sum(1), []
    for i in range(9):
        loss = F.cross_entropy(model(X[i : i + 1]), HOLES[i : i + 1], reduction="sum")
        divisor = max(1, int(counts[i])) if task.reduction == "mean" else float(counts.double().mean())
        gradients = torch.autograd.grad(loss / divisor, list(model.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["ekfac", "influence-cg", "trak", "logra"])
def test_methods_that_read_gradients_take_pictures(method: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)))
    data = TensorDataset(X, HOLES)
    attribution = attribute(model, data, train_data=data, task=DenseClassification("sum"), method=method, **QUIET)
    assert attribution.scores.isfinite().all()
    assert (attribution.scores[:, 4] == 0).all()


def test_stride_refuses_places_by_name() -> None:
    model, data = nn.Conv2d(1, 3, 1).double(), TensorDataset(X, MASKS)
    with pytest.raises(ValueError, match="method='stride' has no readout for a dense classification"):
        attribute(model, data, train_data=data, task=DenseClassification(), method="stride", **QUIET)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0, 3]]), "^Row 0 of the batch has the label 3; the model predicts 0..2"),
        (torch.zeros(1, 2), "int"),
    ],
)
def test_labels_that_are_no_class_are_refused(labels: Tensor, message: str) -> None:
    task = DenseClassification()
    with pytest.raises(ValueError, match=message):
        task.encode(task.targets((None, labels)), 3)


def test_labels_of_tokens_stand_beside_them() -> None:
    task, ids = TokenClassification(), torch.tensor([[5, 6, 7]])
    batch = {"input_ids": ids, "labels": torch.tensor([[-100, 1, 0]])}
    assert task.targets(batch).tolist() == [[[0, 0], [1, 1], [0, 1]]]
    with pytest.raises(ValueError, match=r"Expected labels of the shape of input_ids, \(1, 3\)"):
        task.targets({"input_ids": ids, "labels": torch.tensor([[1, 0]])})
