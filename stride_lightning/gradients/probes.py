"""A few training examples on which a loss of the module's own is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.gradients.kinds import Kind, kind_of
from stride_lightning.gradients.step_outputs import NoRows, SkippedStep, StepInputs, StepOutputs
from stride_lightning.model.layers import in_precision_of
from stride_lightning.runtime.checks import first_line
from stride_lightning.tasks.training_step import TrainingStep

#: Examples on which a loss is looked at.
NUM_EXAMPLES = 32
#: Draws of a random loss that are looked at.
NUM_COMPARED_DRAWS = 8
#: The curvature is not taken at a wider tap.
MAX_CURVED_OUTPUTS = 256
#: Nor where examples with fewer of the squared slopes are curved; those are, with more than this of the most curved.
MIN_CURVED_SHARE, MIN_CURVATURE = 0.1, 1e-6


class Probes:
    """A few training examples, as batches."""

    def __init__(self, model: nn.Module, train: Examples, device: torch.device) -> None:
        self._model, self._train, self._device = model, train, device
        num = min(NUM_EXAMPLES, len(train))
        self.places = [place * (len(train) - 1) // max(1, num - 1) for place in range(num)]
        self.places = list(dict.fromkeys(self.places))

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, rows: Sequence[int], draw: int = 0) -> StepInputs:
        """The batch of some of the examples."""
        part = self._train.subset([self.places[row] for row in rows])
        batch = in_precision_of(self._model, first_batch(part, len(rows), self._device))
        return StepInputs(batch, part.positions.to(self._device), draw)

    def leave_out_skipped(self, step: TrainingStep) -> None:
        """Leave out examples for which the step skips a batch.

        Raises:
            ValueError: If the loss of an example is not finite, and that of the batch because of it.
        """
        loss = step(*self.batch(range(len(self))))
        if loss is not None and torch.isfinite(loss):
            return
        alone = [step(*self.batch([row])) for row in range(len(self))]
        if loss is None:
            places = [place for place, one in zip(self.places, alone, strict=True) if one is not None]
            self.places = places or self.places
            return
        wrong = [row for row, one in enumerate(alone) if one is not None and not torch.isfinite(one)]
        if 0 < len(wrong) < len(self):
            refuse_not_finite([f"{self._train.kind} {self._train.name(self.places[row])}" for row in wrong])


def refuse_not_finite(names: Sequence[str], *, alone: bool = True) -> NoReturn:
    """Refuse examples with a loss that is not finite, or a batch of them where each alone has one."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    what = "The loss" if alone else "The loss of a batch, or an output of it,"
    raise ValueError(
        f"{what} is not finite for {', '.join(names[:10])}{more}. Check these examples and the weights, and the "
        "loss for a logarithm or a division by 0; or pass another with `loss=`."
    )


@contextmanager
def says_why(step: TrainingStep) -> Iterator[None]:
    """Turn errors of a step that runs outside of a fit into one that says so."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
        if isinstance(error, NoRows) or (isinstance(error, ValueError) and "`loss=" in str(error)):
            raise
        raise ValueError(
            f"{step.name} cannot be run on a batch of examples ({type(error).__name__}: {first_line(error)}). Pass "
            "another `loss=`, a function of (model, batch) that returns the loss of each example, shape (B,)."
        ) from error


def is_random(step: TrainingStep, inputs: StepInputs) -> bool:
    """Whether draws of a loss differ."""
    first = step(inputs.batch, inputs.keys)
    others = (step(inputs.batch, inputs.keys, draw) for draw in range(1, NUM_COMPARED_DRAWS))
    return first is not None and any(other is not None and not torch.equal(first, other) for other in others)


def kind_in_draws(outputs: StepOutputs, probes: Probes, kind: Kind) -> Kind:
    """The kind of a random loss in other draws, too: it may mix the examples of a batch in some of them only.

    Raises:
        NoRows: If outputs of an example change with the rest of its batch.
    """
    few = range(min(4, len(probes)))
    for draw in range(1, NUM_COMPARED_DRAWS):
        whole, half = probes.batch(few, draw), probes.batch(few[:2], draw)
        alone = [probes.batch([row], draw) for row in few]
        with outputs.without_loss():
            rows = [outputs(inputs) for inputs in (whole, *alone) if runs(outputs, inputs)]
        if len(rows) == len(few) + 1 and len({part.shape[1] for part in rows}) == 1:
            together, separate = rows[0], torch.cat(rows[1:])
            if (together - separate).abs().max() > 1e-3 * together.abs().max():
                raise NoRows("the outputs for an example change with the rest of its batch")
        slopes = [slopes_or_none(outputs, inputs) for inputs in alone]
        if kind_of_loss(outputs, whole, [half], slopes) == "coupled":
            return "coupled"
    return kind


def why_flat(outputs: StepOutputs, inputs: StepInputs, kind: Kind, *, is_padded: bool) -> str:
    """Why a loss has no second derivatives at its tap that are worth using; empty if it has.

    Where only few of the squared slopes are those of curved examples, as with L1 or with Huber's loss far out, the
    curvature says little of what a step changes. Neither the unit of the loss nor that of the outputs matters.
    """
    if kind == "coupled":
        return "the loss couples the examples of a batch"
    if is_padded:
        return "the outputs of an example have padding"
    try:
        if (width := outputs(inputs).shape[1]) > MAX_CURVED_OUTPUTS:
            return f"the loss has {width} outputs of an example, more than {MAX_CURVED_OUTPUTS}"
        curvature, slopes = outputs.second_derivatives().double(), outputs.slopes().double()
    except (SkippedStep, RuntimeError) as error:  # some operations have no second derivative
        return f"the loss has no second derivatives ({first_line(error)})"
    traces = torch.linalg.eigvalsh((curvature + curvature.transpose(1, 2)) / 2).clamp(min=0).sum(1)
    squares = slopes.square().sum(1)
    is_curved = traces > MIN_CURVATURE * traces.max()
    if squares[is_curved].sum() <= MIN_CURVED_SHARE * squares.sum():
        return "the second derivatives of the loss vanish for most examples"
    return ""


def runs(outputs: StepOutputs, inputs: StepInputs) -> bool:
    """Whether a batch runs through the model."""
    try:
        outputs.run(inputs)
    except (SkippedStep, ValueError, RuntimeError, IndexError, TypeError):
        return False
    return True


def slopes_or_none(outputs: StepOutputs, inputs: StepInputs) -> Tensor | None:
    """Slopes of the loss of a batch; None where it has no loss, or one that is not finite."""
    try:
        outputs(inputs)
        slopes = outputs.slopes()
    except NoRows:
        raise
    except Exception:  # a single example may be too few for a loss, which may raise anything then
        return None
    return slopes if torch.isfinite(slopes).all() else None


def kind_of_loss(
    outputs: StepOutputs, whole: StepInputs, parts: Sequence[StepInputs], alone: Sequence[Tensor | None]
) -> Kind | None:
    """The kind of a loss, from a batch, parts of it that begin as it does, and the slopes of its single examples."""
    batches = [(torch.arange(len(inputs.keys)), slopes_or_none(outputs, inputs)) for inputs in (whole, *parts)]
    batches = [(places, slopes) for places, slopes in batches if slopes is not None]
    if not batches:
        raise ValueError("training_step returns no finite loss")
    nothing = torch.zeros_like(batches[0][1][:1])
    return kind_of(batches, torch.cat([nothing if slopes is None else slopes for slopes in alone]))


def find_views_first(outputs: StepOutputs, together: StepInputs, singles: Sequence[StepInputs]) -> frozenset[str]:
    """Modules whose rows are all examples once, then all again: those whose first row of the second example says so."""
    size = len(singles)
    names = set()
    if size < 2:
        return frozenset()
    whole, second = outputs.run(together), outputs.run(singles[1])
    for key, tensor in whole.items():
        if tensor.ndim and len(tensor) > size and len(tensor) % size == 0 and key in second:
            parts = len(tensor) // size
            last = second[key][-1]
            if not torch.allclose(tensor[2 * parts - 1], last, rtol=1e-3, atol=1e-5):
                names.add(key[0])
    return frozenset(names)


def cut(inputs: StepInputs, rows: slice) -> StepInputs:
    """Some examples of a batch, with the padding of the batch."""
    size = len(inputs.keys)

    def part(leaf: Any) -> Any:
        return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size else leaf

    return StepInputs(pytree.tree_map(part, inputs.batch), inputs.keys[rows], inputs.draw)
