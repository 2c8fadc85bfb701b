"""Weights, smoothing, ignored targets, soft labels and factors: losses and their derivatives against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stride_lightning import BinaryClassification, Classification, Regression, StrideModule, Task, TokenClassification
from stride_lightning.tasks.parts import Parts
from tests.helpers.tiny import random_tensor

OUTPUTS = random_tensor(9, 3, seed=0)
CLASSES = torch.arange(9) % 3
IGNORED = CLASSES.where(CLASSES != 1, -7)
WEIGHTS = torch.tensor([0.2, 1.0, 3.0]).double()
OF_EXAMPLES = random_tensor(9, seed=1).abs()
SOFT, NUMBERS = random_tensor(9, 3, seed=2).softmax(1), random_tensor(9, 3, seed=3)
BITS = (NUMBERS > 0).double()
PARTS = Parts((0,), 1, 2)


def cross_entropy(target: Tensor, **options: Any) -> Any:
    return lambda o: F.cross_entropy(o, target, reduction="none", **options)


CASES: dict[str, tuple[Task, tuple[Tensor, ...], Any]] = {
    "weights": (Classification(class_weights=WEIGHTS), (CLASSES,), cross_entropy(CLASSES, weight=WEIGHTS)),
    "smoothing": (Classification(label_smoothing=0.2), (CLASSES,), cross_entropy(CLASSES, label_smoothing=0.2)),
    "both, ignored": (
        Classification(class_weights=WEIGHTS, label_smoothing=0.2, ignore_index=-7),
        (IGNORED,),
        cross_entropy(IGNORED, weight=WEIGHTS, label_smoothing=0.2, ignore_index=-7),
    ),
    "soft": (Classification(soft_labels=True), (SOFT,), cross_entropy(SOFT)),
    "soft, weights, smoothing": (
        Classification(soft_labels=True, class_weights=WEIGHTS, label_smoothing=0.2),
        (SOFT,),
        cross_entropy(SOFT, weight=WEIGHTS, label_smoothing=0.2),
    ),
    "positive weights": (
        BinaryClassification(pos_weight=WEIGHTS),
        (BITS,),
        lambda o: F.binary_cross_entropy_with_logits(o, BITS, pos_weight=WEIGHTS, reduction="none").sum(1),
    ),
    "examples of classes": (
        Classification().changed(parts=PARTS),
        (CLASSES, OF_EXAMPLES),
        lambda o: OF_EXAMPLES * F.cross_entropy(o, CLASSES, reduction="none"),
    ),
    "examples of numbers": (
        Regression(0.7).changed(parts=PARTS),
        (NUMBERS, OF_EXAMPLES),
        lambda o: OF_EXAMPLES * (o - NUMBERS).square().sum(1) / (2 * 0.49),
    ),
    "examples of bits, positive weights": (
        BinaryClassification(pos_weight=[2.0]).changed(parts=PARTS),
        (BITS, OF_EXAMPLES),
        lambda o: (
            OF_EXAMPLES
            * F.binary_cross_entropy_with_logits(o, BITS, pos_weight=WEIGHTS.new_tensor([2.0]), reduction="none").sum(1)
        ),
    ),
}


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_derivatives_equal_those_of_torch(case: str, factor: float) -> None:
    task, targets, losses = CASES[case]
    task = task.with_scale(factor)
    encoded = task.encode(task.targets((OUTPUTS, *targets)), 3).double()
    # Weights of classes are encoded in single precision.
    torch.testing.assert_close(task.loss(OUTPUTS, encoded), factor * losses(OUTPUTS), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(task.loss(OUTPUTS.T, encoded.T, dim=0), task.loss(OUTPUTS, encoded))
    outputs = OUTPUTS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(task.loss(outputs, encoded).sum(), outputs)
    torch.testing.assert_close(task.residual(task.mean(OUTPUTS), encoded), slope)
    torch.testing.assert_close(task.residual(task.mean(OUTPUTS.T, dim=0), encoded.T, dim=0), slope.T)
    mean, weights = task.mean(OUTPUTS), torch.ones(9, 1) * task.output_weights(encoded)
    units = [unit.expand(9, 3) for unit in torch.eye(3).double()]
    for i in range(9):
        hessian = torch.autograd.functional.hessian(lambda o, i=i: task.loss(o, encoded[i]), OUTPUTS[i])
        columns = torch.stack([(weights * task.curvature(mean, unit))[i] for unit in units], 1)
        torch.testing.assert_close(columns, hessian)
        torch.testing.assert_close((weights * task.curvature_diagonal(mean))[i], hessian.diagonal())
        root = torch.stack([(weights.sqrt() * task.curvature_root(mean, unit))[i] for unit in units], 1)
        torch.testing.assert_close(root @ root.T, hessian)


@pytest.mark.parametrize("case", CASES)
def test_the_constant_has_no_slope_but_that_of_one_more_example(case: str) -> None:
    task, targets, _ = CASES[case]
    encoded = task.encode(task.targets((OUTPUTS, *targets)), 3).double().repeat(500, 1)
    constant = task.constant(encoded).expand(len(encoded), -1)
    slope = task.residual(task.mean(constant), encoded).sum(0)
    size = torch.as_tensor(task.output_weights(encoded)).sum(0)
    assert float((slope.abs() / size).max()) < 1e-3


def test_weights_that_are_divided_by_have_a_mean_of_one() -> None:
    task = Classification(class_weights=WEIGHTS, label_smoothing=0.2, ignore_index=-7)
    encoded = task.encode(IGNORED, 3).double()
    scaled = task.scaled_to(encoded)
    weights = WEIGHTS[IGNORED.clamp(0)].where(IGNORED >= 0, 0)
    torch.testing.assert_close(task.example_weights(encoded), weights, rtol=1e-6, atol=0)
    mean = F.cross_entropy(OUTPUTS, IGNORED, WEIGHTS, ignore_index=-7, label_smoothing=0.2)
    torch.testing.assert_close(scaled.loss(OUTPUTS, encoded).mean(), mean, rtol=1e-6, atol=0)
    assert repr(scaled) == repr(task)
    assert scaled.scaled_to(encoded).dispersion == scaled.dispersion
    assert Classification(class_weights=WEIGHTS, normalised=False).scaled_to(encoded).dispersion == 1


def test_targets_come_back_where_a_weight_is_large_or_zero() -> None:
    task = Classification(class_weights=[1e-3, 1.0, 0.0], label_smoothing=0.3)
    assert task.decode(task.encode(CLASSES, 3)).tolist()[:2] == [0, 1]
    zero = Classification(class_weights=[1.0, 1.0, 0.0])
    assert torch.equal(zero.decode(zero.encode(CLASSES, 3)), CLASSES)
    ignoring = Classification(ignore_index=-7)
    assert torch.equal(ignoring.decode(ignoring.encode(IGNORED, 3)), IGNORED)
    of_bits = BinaryClassification(pos_weight=3)
    assert torch.equal(of_bits.decode(of_bits.encode(BITS, 3)), BITS.float() * 1.0)


def test_representations_are_what_makes_the_task() -> None:
    for task in (
        Classification(class_weights=[0.2, 1, 5], label_smoothing=0.1, ignore_index=-100),
        Classification(class_weights=[0.2, 1, 5], normalised=False),
        Classification(soft_labels=True),
        BinaryClassification(pos_weight=[2, 3]),
    ):
        assert repr(eval(repr(task))) == repr(task)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(class_weights=[1.0, -1.0]), "`class_weights` must be one number of at least 0"),
        (lambda: Classification(label_smoothing=1.0), "`label_smoothing` must be at least 0 and below 1, got 1.0"),
        (lambda: Classification(class_weights=[1.0]).encode(CLASSES, 3), "1 class weights do not fit a model of 3"),
        (lambda: Classification(soft_labels=True).encode(SOFT[:, :2], 3), r"Soft labels are floats of shape \(B, 3\)"),
        (lambda: Classification(soft_labels=True).encode(-SOFT, 3), "^Row 0 .* and a soft label must not be negative"),
        (
            lambda: Regression().changed(parts=PARTS).encode(torch.tensor([[1.0, 1.0], [2.0, -3.0]]), 1),
            "^Row 1 of the batch has the weight -3. Give it a finite weight of 0 or more",
        ),
        (
            lambda: Classification(label_smoothing=0.1).margin(OUTPUTS, SOFT),
            "is no function of a margin",
        ),
        (
            lambda: StrideModule(None, Classification(class_weights=[1.0, 2.0]), basis="learned"),
            "basis='learned' knows no weights of examples or classes",
        ),
        (lambda: TokenClassification("median"), "`reduction` must be one of"),
        (lambda: TokenClassification().margin(OUTPUTS, SOFT), "has no margin, only its places have"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_packed_texts_have_no_classes_of_tokens() -> None:
    batch = {"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long()}
    batch["position_ids"] = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(TypeError, match="Packed texts have no classes of tokens here"):
        TokenClassification().targets(batch)
