"""Class weights and label smoothing, read off the gradients of a module's own loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from stride_lightning.data.step_gradients import StepGradients
from stride_lightning.data.trials import Trial
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Task

#: Most classes whose weights are looked for: every one of them must be in a batch of 64, and takes two gradients.
MOST_CLASSES = 32

#: ``read(task, trial)`` runs a model: outputs with a graph and encoded targets, both of shape ``(B, C)``.
Read = Callable[[Task, Trial], tuple[Tensor, Tensor]]


def weighted_tasks(task: Task, step: StepGradients, read: Read) -> Iterator[Task]:
    """Tasks with weights and smoothing that the loss may have, likeliest first; each needs a check of its own."""
    if step.first is None:
        return
    if isinstance(task, Classification) and not task.soft_labels and not task.has_tokens:
        yield from _of_classes(task, step, read)
    elif isinstance(task, BinaryClassification) and not task.is_weighted:
        yield from _of_positives(task, step, read)


def _of_classes(task: Classification, step: StepGradients, read: Read) -> Iterator[Task]:
    # The loss is a sum of -log p_c over examples of class c ("hard"), and over all examples ("even").
    def terms(trial: Trial) -> Sequence[Tensor]:
        outputs, encoded = read(task, trial)
        surprises = -outputs.log_softmax(1)
        of_class = encoded > 0
        counted = of_class.any(1, keepdim=True)
        return [*(surprises * of_class).sum(0), *(surprises * counted).sum(0)]

    with torch.no_grad():
        _, encoded = read(task, step.trials[0])
    count = encoded.shape[1]
    if count > MOST_CLASSES or not bool((encoded > 0).any(0).all()):
        return
    gradients, wanted = _solvable(step, terms, 2 * count)
    hard, even = gradients[:, :count], gradients[:, count:]
    like: dict[str, Any] = {"ignore_index": task.ignore_index}

    def smoothing(of_hard: Tensor, of_even: Tensor) -> float:
        ratio = float(of_even.sum() / of_hard.sum()) * count  # e / (1 - e)
        return plain(ratio / (1 + ratio)) if ratio > 0 else 0.0

    one, other = _solved(torch.stack([hard.sum(1), even.sum(1)], 1), wanted)
    if 0 < (share := smoothing(one, other)) < 1:
        yield Classification(label_smoothing=share, **like)
    weights = _solved(hard, wanted)
    if float(weights.max()) > 0:
        yield Classification(class_weights=_relative(weights), **like)
    both = _solved(gradients, wanted)
    share = smoothing(both[:count], both[count:])
    weights = _solved((1 - share) * hard + share / count * even, wanted)
    if 0 < share < 1 and float(weights.max()) > 0:
        yield Classification(class_weights=_relative(weights), label_smoothing=share, **like)


def _of_positives(task: BinaryClassification, step: StepGradients, read: Read) -> Iterator[Task]:
    def terms(trial: Trial) -> Sequence[Tensor]:
        outputs, encoded = read(task, trial)
        losses = torch.nn.functional.softplus(outputs) - encoded * outputs
        return [*(losses * encoded).sum(0), *(losses * (1 - encoded)).sum(0)]

    with torch.no_grad():
        _, encoded = read(task, step.trials[0])
    count = encoded.shape[1]
    has_both = bool((encoded > 0).any(0).all() and (encoded < 1).any(0).all())
    if count > MOST_CLASSES or not has_both:
        return
    gradients, wanted = _solvable(step, terms, 2 * count)
    of_ones, of_zeros = gradients[:, :count], gradients[:, count:]
    ones, zeros = _solved(torch.stack([of_ones.sum(1), of_zeros.sum(1)], 1), wanted)
    if ones > 0 and zeros > 0:
        yield BinaryClassification(pos_weight=plain(float(ones / zeros)))
    if count > 1:
        solved = _solved(gradients, wanted)
        weights = solved[:count] / solved[count:].mean()
        if bool((weights > 0).all()):
            yield BinaryClassification(pos_weight=[plain(weight) for weight in weights.tolist()])


def _solvable(step: StepGradients, terms: Callable[[Trial], Sequence[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Gradients of the terms ``(p, t)`` and of the step ``(p,)`` on the first trial, at all weights alike.

    The last parameters are enough for ``count`` unknowns, and their gradients take little.
    """
    last = step.last_parameters(16 * count)
    parts, wanted = [], []
    for key, gradients in step.of_losses(terms, step.settings, last).items():
        value = step.values[key]
        if value is not None:
            ours = value[-len(gradients[0]) :]
            size = float(ours.abs().max()) or 1.0
            parts.append(torch.stack(gradients, 1) / size)
            wanted.append(ours / size)
    return torch.cat(parts), torch.cat(wanted)


def _solved(columns: Tensor, wanted: Tensor) -> Tensor:
    # By the normal equations of columns of unit length: a class of a few examples has a small column.
    sizes = columns.norm(dim=0).clamp(min=torch.finfo(columns.dtype).tiny)
    return torch.linalg.lstsq(columns / sizes, wanted[:, None], driver="gelsd").solution[:, 0] / sizes


def _relative(weights: Tensor) -> list[float]:
    """Weights over the largest of them; those that are rounding are 0."""
    relative = weights / weights.max()
    return [plain(weight) if weight > 1e-4 else 0.0 for weight in relative.tolist()]


def plain(value: float, rounding: float = 2e-5) -> float:
    """A number without its rounding: a simple fraction or its inverse, a number of three digits, or of five.

    Example:
        >>> plain(0.33333421), plain(0.12300021), plain(0.1239876), plain(1 / 3072.001)
        (0.3333333333333333, 0.123, 0.12399, 0.0003255208333333333)
    """
    if not value or not math.isfinite(value):
        return value
    whole = Fraction(value if abs(value) > 1 else 1 / value).limit_denominator(16)
    simple = float(whole if abs(value) > 1 else 1 / whole)
    for candidate in (simple, float(f"{value:.3g}")):
        if abs(candidate - value) <= rounding * abs(value):
            return candidate
    return float(f"{value:.5g}")
