"""Gradients of a module's own loss at its weights and at moved ones, and those of likelihoods beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.trials import Trial
from stride_lightning.model.layers import in_precision_of, uncompiled
from stride_lightning.tasks.training_step import Moment, TrainingStep

#: Values that stand for the gradient in one parameter.
SKETCH = 4096
#: Moves that are tried, and larger weights, until outputs stay moderate.
NOISES, FACTORS = (1.0, 0.3, 0.1, 0.03), (8.0, 4.0, 2.0, 1.4)
#: Logits up to so many are moderate; beyond, a sigmoid in single precision is 1. Numbers may be further out.
MODERATE, FAR = 12.0, 64.0


@dataclass(frozen=True)
class Setting:
    """Weights: moved by noise, relative to the spread of each parameter, and multiplied by a factor.

    A head that starts at zero makes all losses alike, and a clipped loss or Huber's differ from others far out only.
    """

    noise: float = 0.0
    factor: float = 1.0


@contextmanager
def weights_at(model: nn.Module, setting: Setting) -> Iterator[None]:
    """The weights of a setting inside the block; afterwards they are as before, to the bit."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    saved = [parameter.detach().clone() for parameter in parameters] if setting != Setting() else []
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in parameters if saved else []:
                spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(setting.noise * (spread or 0.1) * noise).mul_(setting.factor)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=False):
                parameter.copy_(value)


def settings_of(model: nn.Module, outputs: Callable[[], Tensor], *, far: bool) -> list[Setting]:
    """The weights as they are, moved ones, and larger ones, at which outputs stay moderate.

    Outputs that are numbers may go ``far``: eight times as far as they are.
    """

    def largest(setting: Setting) -> float:
        with weights_at(model, setting), torch.no_grad():
            values = outputs()
        return float(values.abs().max()) if bool(torch.isfinite(values).all()) else torch.inf

    now = largest(Setting())
    most = max(FAR, 8 * now) if far else max(MODERATE, now)
    noise = next((noise for noise in NOISES if largest(Setting(noise)) <= most), NOISES[-1])
    factor = next((factor for factor in FACTORS if largest(Setting(noise, factor)) <= most), None)
    return [Setting(), Setting(noise), *([] if factor is None else [Setting(noise, factor)])]


class StepGradients:
    """Gradients of a module's own loss, on some trials, at its weights and at moved ones.

    At most eleven steps are run: all trials at the moved weights and at the larger ones, two at the weights as they
    are, and one at a later moment of training.

    Args:
        model: In eval mode, on the device.
        step: Its own loss.
        trials: The batches, largest first.
        settings: The weights.

    Attributes:
        problem: Why no likelihood can be compared with the loss; empty if one can.
    """

    def __init__(self, model: nn.Module, step: TrainingStep, trials: Sequence[Trial], settings: list[Setting]) -> None:
        self.model, self.trials, self._order = model, trials, settings
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.problem = "" if self.parameters else "the module has no trainable parameter"
        #: Gradients by number of the setting and of the trial; None where ``training_step`` skips the batch.
        self.values: dict[tuple[Setting, int], Tensor | None] = {}
        for setting in settings if self.parameters else []:
            numbers = range(len(trials)) if setting != Setting() else sorted({0, len(trials) // 2})
            gradients = self._of_step(step, setting, numbers)
            if gradients is not None:
                self.values |= {(setting, number): value for number, value in gradients.items()}
            elif setting.factor == 1:
                self.problem = "training_step returned a loss that is not finite"
                return
        if self.parameters and all(value is None for value in self.values.values()):
            self.problem = "training_step skips every batch that was tried"
        elif len(settings) > 1 and self.parameters:
            self._compare_moments(step, settings[1], min(1, len(trials) - 1))

    def _of_step(self, step: TrainingStep, setting: Setting, numbers: Sequence[int]) -> dict[int, Tensor | None] | None:
        """Gradients of some trials; None if a loss or a gradient is not finite."""
        gradients: dict[int, Tensor | None] = {}
        with weights_at(self.model, setting), uncompiled():
            for number in numbers:
                trial = self.trials[number]
                # Every run has other random numbers: some may leave the loss nearly as it is without (mixup).
                draw = self._order.index(setting) * len(self.trials) + number
                try:
                    loss = step(in_precision_of(self.model, trial.batch), trial.keys, draw)
                except Exception:  # a single example may be too few for a loss or a metric, which may raise anything
                    if len(trial) > 1:
                        raise
                    loss = None
                if loss is None:
                    gradients[number] = None
                    continue
                gradients[number] = gradient = self.sketch(loss)
                if not (bool(torch.isfinite(loss)) and bool(torch.isfinite(gradient).all())):
                    return None
        return gradients

    def _compare_moments(self, step: TrainingStep, setting: Setting, number: int) -> None:
        moment = step.moment or Moment()
        moment = replace(moment, current_epoch=moment.current_epoch + 7, global_step=moment.global_step + 1000)
        later = step.at(moment, batch_idx=1)
        (gradient,) = (self._of_step(later, setting, [number]) or {number: None}).values()
        now = self.values[setting, number]
        if now is None or gradient is None:
            differs = now is not gradient
        else:
            differs = bool(((now - gradient).abs() > self.allowed([now])).any())
        if differs:
            self.problem = "training_step returns another loss for another batch_idx or later in training"

    @property
    def settings(self) -> list[Setting]:
        """The weights at which steps were run; moved ones first, where losses differ most."""
        return sorted(dict.fromkeys(setting for setting, _ in self.values), key=lambda setting: setting == Setting())

    def of_losses(
        self, losses: Callable[[Trial], Sequence[Tensor]], settings: Sequence[Setting], last: int | None = None
    ) -> dict[tuple[Setting, int], list[Tensor]]:
        """Gradients of other losses of the trials, where those of the step were taken.

        ``losses(trial)`` are scalars with a graph. With ``last``, only those of the first trial are taken, in the last
        so many parameters.
        """
        gradients: dict[tuple[Setting, int], list[Tensor]] = {}
        for setting in settings:
            with weights_at(self.model, setting), uncompiled(), torch.enable_grad():
                for number, trial in enumerate(self.trials if last is None else self.trials[:1]):
                    if (setting, number) in self.values:
                        gradients[setting, number] = [self.sketch(loss, last) for loss in losses(trial)]
        return gradients

    def last_parameters(self, count: int) -> int:
        """How many of the last parameters have gradients with so many values together."""
        parts, values = [] if self.first is None else self.first.split(self.widths), 0
        for number, part in enumerate(reversed(parts), 1):
            values += part.numel() if bool(part.any()) else 0
            if values >= count:
                return number
        return len(self.widths)

    @property
    def first(self) -> Tensor | None:
        """Gradient of the step on the first trial, at moved weights; None where ``training_step`` skips it."""
        return self.values[self.settings[0], 0]

    def sketch(self, loss: Tensor, last: int | None = None) -> Tensor:
        """The gradient of a loss, float64 on the CPU: large parameters by random sums of their gradient's rows."""
        parameters = self.parameters if last is None else self.parameters[-last:]
        if not loss.requires_grad:
            return torch.zeros(sum(self.widths[-len(parameters) :]), dtype=torch.float64)
        how: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return torch.cat([_sketched(gradient) for gradient in torch.autograd.grad(loss, parameters, **how)])

    @property
    def widths(self) -> list[int]:
        """Values that stand for each parameter."""
        return [min(parameter.numel(), SKETCH) for parameter in self.parameters]

    @property
    def rounding(self) -> float:
        """Relative difference of two factors that counts as rounding."""
        return max(2e-5, *(4 * torch.finfo(parameter.dtype).eps for parameter in self.parameters))

    def allowed(self, gradients: Sequence[Tensor], setting: Setting = Setting()) -> Tensor:
        """Differences that count as rounding, beside gradients of such a size; shape of one of them."""
        size = torch.stack(list(gradients)).abs().amax(0)
        of_parameters = torch.cat([part.amax().expand_as(part) for part in size.split(self.widths) if len(part)])
        rounding = max(torch.finfo(parameter.dtype).eps for parameter in self.parameters)
        of_all = 1e-5 if setting.factor == 1 else 1e-4  # a backward pass through much larger weights rounds more
        return max(2e-4, 8 * rounding) * of_parameters + max(of_all, rounding) * size.max() + self._floor

    @property
    def _floor(self) -> float:
        # At the weights of a network that has memorised its data, gradients are hardly more than rounding.
        moved = [value for (setting, _), value in self.values.items() if setting.noise and setting.factor == 1]
        return max((1e-6 * float(value.abs().max()) for value in moved if value is not None), default=0.0)

    def factor(self, gradients: dict[tuple[Setting, int], Tensor], divisors: Sequence[float]) -> float | None:
        """The factor ``k`` with ``step = k gradients / divisor`` in all trials that have gradients; None if none is.

        The same difference in all trials, at the same weights, is a penalty on weights: it belongs to no example.
        """
        pairs = []
        for setting in dict.fromkeys(setting for setting, _ in gradients):
            steps = [
                (number, value)
                for (where, number), value in self.values.items()
                if where == setting and value is not None and divisors[number] > 0
            ]
            scaled = {number: gradients[setting, number] / divisors[number] for number, _ in steps}
            for number, value in steps[1:] if len(self.trials) > 1 else []:
                first, of_first = steps[0]
                allowed = self.allowed([value, of_first], setting)
                pairs.append((value - of_first, scaled[number] - scaled[first], allowed))
            if len(self.trials) == 1 and steps:
                pairs.append((steps[0][1], scaled[0], self.allowed([steps[0][1]], setting)))
        sizes = [float(step.abs().max()) or 1.0 for step, _, _ in pairs]
        above = sum(float(step @ other) / size**2 for (step, other, _), size in zip(pairs, sizes, strict=True))
        below = sum(float(other @ other) / size**2 for (_, other, _), size in zip(pairs, sizes, strict=True))
        if not below > 0 or not above > 0:
            return None
        factor = above / below
        agree = all(bool(((step - factor * other).abs() <= allowed).all()) for step, other, allowed in pairs)
        return factor if agree else None


def _sketched(gradient: Tensor) -> Tensor:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    flat = gradient.detach().flatten()
    if len(flat) > SKETCH:
        rows = nn.functional.pad(flat.float(), (0, -len(flat) % SKETCH)).view(-1, SKETCH)
        signs = torch.randint(2, (len(rows),), generator=torch.Generator().manual_seed(len(rows))) * 2 - 1
        flat = signs.to(rows) @ rows
    return flat.cpu().double()
