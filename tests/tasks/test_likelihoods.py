"""Tasks: losses, gradients and curvatures against torch, and what is inferred from a batch."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stride_lightning.tasks.inference import check_forward, infer_task_of
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Regression, Task
from tests.helpers.models import DictTask
from tests.helpers.tiny import every_task, random_targets, random_tensor

HINT = r"Pass `task=`: Classification\(\), BinaryClassification\(\), Regression\(\), SequenceClassification\(\)"


class Constant(nn.Module):
    """Outputs that do not depend on the inputs."""

    def __init__(self, outputs: object) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs: Tensor) -> object:
        return self.outputs


# ---- the likelihood -----------------------------------------------------------------------------------------


@every_task
def test_loss_equals_torch(task: Task) -> None:
    outputs, targets = random_tensor(9, 3, seed=0), random_targets(task, 9, 3, seed=1)
    if isinstance(task, Classification):
        expected = F.cross_entropy(outputs, targets, reduction="none")
    elif isinstance(task, BinaryClassification):
        expected = F.binary_cross_entropy_with_logits(outputs, targets.double(), reduction="none").sum(1)
    else:
        variance = torch.full_like(outputs, 0.7**2)
        expected = (F.gaussian_nll_loss(outputs, targets, variance, reduction="none") - variance.log() / 2).sum(1)
    encoded = task.encode(targets, 3).double()
    torch.testing.assert_close(task.loss(outputs, encoded), expected)
    torch.testing.assert_close(task.loss(outputs.T, encoded.T, dim=0), expected)


@every_task
def test_gradient_is_mean_minus_soft_target_over_dispersion(task: Task) -> None:
    outputs, soft = random_tensor(7, 4, seed=0).requires_grad_(), task.mean(random_tensor(7, 4, seed=1))
    (gradient,) = torch.autograd.grad(task.loss(outputs, soft).sum(), outputs)
    torch.testing.assert_close((task.mean(outputs) - soft) / task.dispersion, gradient)
    (gradient,) = torch.autograd.grad(task.loss(outputs.T, soft.T, dim=0).sum(), outputs)
    torch.testing.assert_close((task.mean(outputs.T, dim=0) - soft.T) / task.dispersion, gradient.T)


@every_task
def test_curvature_equals_the_hessian(task: Task) -> None:
    outputs, directions = random_tensor(5, 4, seed=0), random_tensor(5, 4, seed=1)
    target = task.encode(random_targets(task, 5, 4, seed=2), 4).double()
    mean = task.mean(outputs)
    for i in range(5):
        hessian = torch.autograd.functional.hessian(lambda o, i=i: task.loss(o, target[i]), outputs[i])
        torch.testing.assert_close(task.curvature(mean[i], directions[i]), hessian @ directions[i])
        torch.testing.assert_close(task.curvature_diagonal(mean[i]), hessian.diagonal())
    by_columns = task.curvature(mean.T, directions.T, dim=0)
    torch.testing.assert_close(by_columns.T, task.curvature(mean, directions))


def test_losses_stay_finite_at_extreme_outputs() -> None:
    outputs = torch.tensor([[1000.0, -1000.0]])
    wrong = torch.tensor([1])
    torch.testing.assert_close(Classification().loss(outputs, F.one_hot(wrong, 2).float()), torch.tensor([2000.0]))
    torch.testing.assert_close(BinaryClassification().loss(outputs, torch.tensor([[0.0, 1.0]])), torch.tensor([2000.0]))


def test_predict_and_decode() -> None:
    outputs = torch.tensor([[0.5, 2.0, -1.0], [1.0, 0.0, 0.5]])
    classes = Classification()
    assert classes.predict(outputs).tolist() == [1, 0]
    assert classes.decode(classes.encode(torch.tensor([2, 1]), 3)).tolist() == [2, 1]
    binary = BinaryClassification()
    assert binary.predict(outputs).tolist() == [[1, 1, 0], [1, 0, 1]]
    assert binary.decode(binary.encode(torch.tensor([True, False]), 1)).tolist() == [1, 0]
    assert binary.decode(binary.encode(torch.tensor([[1, 0]]), 2)).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="target='predicted' says nothing for a regression"):
        Regression().predict(outputs)


def test_encode_keeps_double_targets_and_turns_integers_to_floats() -> None:
    assert Regression().encode(torch.zeros(3, dtype=torch.float64), 1).dtype == torch.float64
    assert Regression().encode(torch.tensor([1, 5]), 1).tolist() == [[1.0], [5.0]]
    assert Classification().encode(torch.tensor([1], dtype=torch.uint8), 2).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("task", "targets", "num_outputs", "message"),
    [
        (Classification(), torch.tensor([0.5, 1.0]), 2, r"integer targets of shape \(B,\), got float32 tensor"),
        (Classification(), torch.tensor([[0, 1]]), 2, r"integer targets of shape \(B,\), got int64 tensor of shape"),
        (
            Classification(),
            torch.tensor([0, 3]),
            3,
            "^Row 1 of the batch has the target 3, and a model with 3 outputs takes 0..2",
        ),
        (Classification(), torch.tensor([-100, 1]), 3, "^Row 0 .* target -100, .* training ignores .*" + HINT),
        (
            BinaryClassification(),
            torch.tensor([0, 2, 1]),
            1,
            "^Row 1 .* has the target 2, and a binary target must be 0 or 1",
        ),
        (BinaryClassification(), torch.tensor([0, 1]), 3, r"Expected 3 target\(s\) per example, got int64 tensor"),
        (Regression(), torch.zeros(4, 2), 1, r"Expected 1 target\(s\) per example, got float32 tensor of shape \(4, 2"),
    ],
)
def test_targets_that_do_not_fit_are_refused(task: Task, targets: Tensor, num_outputs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.encode(targets, num_outputs)


@pytest.mark.parametrize("noise_std", [0.0, -1.0, float("nan"), float("inf")])
def test_noise_must_be_positive(noise_std: float) -> None:
    with pytest.raises(ValueError, match="`noise_std` must be a positive number"):
        Regression(noise_std)


def test_names_and_representations() -> None:
    assert repr(Regression(0.5)) == "Regression(noise_std=0.5)"
    assert repr(Classification()) == "Classification()"
    names = [task.name for task in (Classification, BinaryClassification, Regression)]
    assert names == ["classification", "binary classification", "regression"]


# ---- reading a batch ----------------------------------------------------------------------------------------


def test_batches_are_read_by_position_or_by_a_subclass() -> None:
    task, inputs, targets = Classification(), torch.ones(2, 3), torch.tensor([0, 1])
    assert task.inputs((inputs, targets)) is inputs
    assert task.targets([inputs, targets, "more"]) is targets
    assert task.targets((inputs,)) is None
    assert task.targets(inputs) is None
    batch = {"features": inputs, "answer": targets}
    assert DictTask().inputs(batch) is inputs
    assert DictTask().targets(batch) is targets
    keys = r"dict with keys \['answer', 'features'\]"
    for unread, described in ((batch, keys), (inputs, "float32 tensor"), (3, "int")):
        with pytest.raises(TypeError, match=rf"batch of \(inputs, targets\), got {described}.*{HINT}"):
            task.inputs(unread)


# ---- inferring the task -------------------------------------------------------------------------------------

INPUTS = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("targets", "outputs", "expected"),
    [
        (torch.tensor([0, 2, 1, 1]), random_tensor(4, 3, seed=0), Classification),
        (torch.tensor([0, 1, 1, 1]), random_tensor(4, 2, seed=0), Classification),
        (torch.tensor([0, 2, 1, 1], dtype=torch.uint8), -random_tensor(4, 3, seed=0).square(), Classification),
        (torch.tensor([0, 1, 1, 0]), random_tensor(4, 1, seed=0), BinaryClassification),
        (torch.tensor([0, 1, 1, 0]), random_tensor(4, seed=0), BinaryClassification),
        (torch.tensor([[0], [1], [1], [0]]), random_tensor(4, 1, seed=0), BinaryClassification),
        (torch.tensor([True, False, True, True]), random_tensor(4, seed=0), BinaryClassification),
        (torch.tensor([0.5, 1.0, 3.0, 0.0]), random_tensor(4, seed=0), Regression),
        (torch.tensor([0.5, 1.0, 3.0, 0.0]), random_tensor(4, 1, seed=0), Regression),
        (torch.tensor([[0.5], [1.0], [3.0], [0.0]]), random_tensor(4, seed=0), Regression),
        (torch.arange(8.0).reshape(4, 2), random_tensor(4, 2, seed=0), Regression),
    ],
)
def test_tasks_that_can_be_told(targets: Tensor, outputs: Tensor, expected: type[Task]) -> None:
    assert type(infer_task_of((INPUTS, targets), Constant(outputs))) is expected


@pytest.mark.parametrize(
    ("batch", "outputs", "error", "message"),
    [
        ({"image": INPUTS}, None, TypeError, "got dict with keys"),
        ((INPUTS,), None, TypeError, r"A batch of tuple of 1 item\(s\) does not say its task"),
        ((INPUTS, "label"), None, TypeError, "A batch of tuple of 2"),
        ((INPUTS, torch.arange(4)), (1, 2), TypeError, r"shape \(B,\) or \(B, C\) with B=4 rows, got tuple"),
        ((INPUTS, torch.arange(4)), None, TypeError, "got NoneType"),
        ((INPUTS, torch.arange(4)), torch.zeros(4, 3, 2), TypeError, r"got float32 tensor of shape \(4, 3, 2\)"),
        ((INPUTS, torch.arange(4)), torch.zeros(5, 3), TypeError, r"B=4 rows, got float32 tensor of shape \(5, 3\)"),
        (
            (INPUTS, torch.tensor([0, -100, 1, 1])),
            torch.zeros(4, 3),
            ValueError,
            "Row 1 .* target -100, and a negative target often marks",
        ),
        ((INPUTS, torch.tensor([0, 2, 1, 1])), torch.zeros(4, 1), ValueError, "No built-in task has targets int64"),
        (
            (INPUTS, torch.zeros(4, 3).long()),
            torch.zeros(4, 3),
            ValueError,
            r"No built-in task has .* \(4, 3\) and outputs",
        ),
        (
            (INPUTS, torch.tensor([0, 2, 1, 5])),
            torch.zeros(4, 3),
            ValueError,
            "Row 3 .* a model with 3 outputs takes 0..2",
        ),
        ((INPUTS, torch.tensor([0, 2, 1, 1])), torch.full((4, 3), 1 / 3), ValueError, "look like probabilities"),
        ((INPUTS, random_tensor(4, seed=0)), torch.zeros(4, 3), ValueError, "float targets need one output each"),
        ((INPUTS, torch.tensor([0.0, 1, 1, 0])), torch.zeros(4, 1), ValueError, "first batch are 0 or 1"),
        ((INPUTS, torch.eye(4)), torch.zeros(4, 4), ValueError, "first batch are 0 or 1"),
        ((INPUTS, torch.full((4, 4), 0.25)), torch.zeros(4, 4), ValueError, "sum to 1 look like soft labels"),
        ((INPUTS, torch.tensor(1)), torch.zeros(4, 2), TypeError, ""),
    ],
)
def test_tasks_that_cannot_be_told(batch: object, outputs: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}.*{HINT}"):
        infer_task_of(batch, Constant(outputs))


def test_modules_without_a_forward_are_refused() -> None:
    for model in (L.LightningModule(), type("NoForward", (L.LightningModule,), {})(), nn.Module()):
        with pytest.raises(ValueError, match=f"defines no `forward`.*{HINT}"):
            check_forward(model)
    check_forward(Constant(None))


def test_inference_keeps_no_graph_and_reads_floats_of_any_precision() -> None:
    model = nn.Linear(2, 1).double()
    task = infer_task_of((INPUTS.double(), random_tensor(4, seed=0).double()), model)
    assert isinstance(task, Regression)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_probabilities_with_one_output_are_doubted():
    model = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    batch = torch.zeros(4, 4), torch.tensor([0, 1, 1, 0])
    with pytest.warns(UserWarning, match="lie between 0 and 1 and are read as logits.*Pass `task=`"):
        infer_task_of(batch, model)
