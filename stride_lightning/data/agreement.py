"""Agreement: whether a built-in likelihood is a factor times the module's own loss, decided by gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_look
from stride_lightning.data.reading import required
from stride_lightning.data.step_gradients import Setting, StepGradients, settings_of
from stride_lightning.data.trials import SIZES, Trial, mixed, read_kinds, read_trial, read_trials, spread_places
from stride_lightning.data.weighting import plain, weighted_tasks
from stride_lightning.model.layers import in_precision_of, uncompiled
from stride_lightning.model.weights import borrowed
from stride_lightning.runtime.checks import check_finite, first_line
from stride_lightning.runtime.randomness import preserved_random_state
from stride_lightning.tasks.inference import infer_task_of, likely_tasks
from stride_lightning.tasks.likelihoods import Classification, Regression, Task, columns
from stride_lightning.tasks.training_step import TrainingStep

#: Texts of a trial: logits of every token take much memory.
MOST_TEXTS = 16


@dataclass(frozen=True)
class Agreement:
    """The likelihood that agrees with a module's own loss.

    Attributes:
        task: The likelihood, in the unit of the module's own loss; None where none agrees.
        reason: One line that says which one agrees with which factor, or why none does.
        is_other: Whether gradients tell that the module's own loss is another than every likelihood that fits.
    """

    task: Task | None
    reason: str
    is_other: bool = False


def agree(
    model: nn.Module,
    examples: Examples,
    device: torch.device,
    step: TrainingStep | None,
    *,
    batch_size: int,
    only: Task | None = None,
) -> Agreement:
    """The built-in likelihood whose per-example loss is a factor times the module's own, for the whole data set.

    Shapes of targets and outputs make candidates. Gradients in the parameters decide: at the weights, at moved weights
    and at larger ones, on batches of 64, 16, 5 and 1 examples of all kinds, at most 12 of them. The model is as before
    afterwards, to the bit.

    Args:
        model: The module.
        examples: The training set.
        device: Where the model runs.
        step: The module's own loss; None for a module without one, where shapes alone decide.
        batch_size: Most examples of a batch.
        only: Compare this likelihood alone, as it is; by default all whose shapes fit, with weights and smoothing.

    Raises:
        ValueError: If an example is not finite. Without a ``step``, also if the task cannot be told.
        TypeError: Without a ``step``, if the task cannot be told.
    """
    with (
        torch.inference_mode(False),
        preserved_random_state(model),
        borrowed(model, None, device),
        torch.no_grad(),
    ):
        if step is None:
            head = first_look(examples, batch_size, device)
            with examples.naming(0):
                task = infer_task_of(head, model)
            return Agreement(task, f"{task.name}, by the shapes of outputs and targets: no training_step to compare")
        return _Comparison(model, examples, device, step, batch_size, only).result()


class _Comparison:
    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        device: torch.device,
        step: TrainingStep,
        batch_size: int,
        only: Task | None,
    ) -> None:
        self.model, self.examples, self.device, self.step, self.only = model, examples, device, step, only
        self.limit = min(SIZES[0], batch_size, len(examples))

    def result(self) -> Agreement:
        _ = self.examples.is_random  # of all examples, so that the warning comes once
        spread = spread_places(len(self.examples))
        one = read_trial(self.examples, spread[:1], self.device)
        if isinstance(one.held, Mapping) and "input_ids" in one.held:
            self.limit = min(self.limit, MOST_TEXTS)
        head = read_trial(self.examples, spread[: self.limit], self.device)
        candidates, problem = self._candidates(head)
        if not candidates:
            return Agreement(None, f"no likelihood fits: {problem}")
        trials = self._trials(head, candidates[0])
        try:
            with torch.enable_grad():
                gradients = self._gradients(candidates, trials)
            agreement = None if gradients.problem else self._first(candidates, gradients)
        except Exception as error:  # whatever a user's module raises
            self._check_finite(candidates[0], head)
            self._check_ignored(candidates[0], head)
            return Agreement(None, f"training_step or forward raised {type(error).__name__}: {first_line(error)}")
        if gradients.problem:
            self._check_finite(candidates[0], head)
            return Agreement(None, f"no likelihood is compared: {gradients.problem}")
        names = " or a ".join(dict.fromkeys(task.name for task in candidates))
        reason = f"training_step computes another loss than a {names} of these outputs"
        is_named = problem.startswith(self.examples.kind.capitalize())
        if is_named and any(task.has_tokens for task in candidates):  # a text that no language model can read
            reason = f"{reason}; {problem}"
        return agreement or Agreement(None, reason, is_other=True)

    def _gradients(self, candidates: Sequence[Task], trials: Sequence[Trial]) -> StepGradients:
        is_number = all(isinstance(task, Regression) for task in candidates)
        some = trials[min(1, len(trials) - 1)]
        settings = settings_of(self.model, lambda: self._read(candidates[0], some)[0], far=is_number)
        return StepGradients(self.model, self.step, trials, settings)

    def _first(self, candidates: Sequence[Task], gradients: StepGradients) -> Agreement | None:
        """The first candidate that agrees, or the first of those with weights and smoothing."""
        for task in candidates:
            if (agreement := self._compared(task, gradients)) is not None:
                return agreement
        for task in candidates if self.only is None else ():
            for weighted in weighted_tasks(task, gradients, self._read):
                agreement = self._compared(weighted.changed(parts=task.parts), gradients)
                if agreement is not None:
                    return agreement
        return None

    def _candidates(self, head: Trial) -> tuple[list[Task], str]:
        """Likelihoods whose shapes fit, and why there are none."""
        problem = ""
        candidates: list[Task] = []

        def fits(task: Task) -> bool:
            nonlocal problem
            try:
                with self.examples.naming(head.places):
                    task.loss(*self._read(task, head))
                return True
            except Exception as error:  # a shape that does not fit
                problem = problem or _sentence(error)
                return False

        try:
            likely = likely_tasks(self.model, head.batch) if self.only is None else [self.only]
            candidates = [task for task in likely if fits(task)]
        except Exception as error:  # of the user's forward
            problem = _sentence(error)
        return candidates, problem or "the batch has no outputs and targets that a likelihood reads"

    def _trials(self, head: Trial, task: Task) -> list[Trial]:
        places = spread_places(len(self.examples))
        alone = int(places[-1])
        if isinstance(task, Classification) and not task.has_tokens and not task.soft_labels:

            def kinds_of(batch: object) -> Tensor:
                return task.unpacked(required(task.targets(batch)))[0].flatten().long()

            with torch.no_grad():
                count = columns(task.outputs(self.model, self._inputs(task, head))).shape[1]
            read, kinds = read_kinds(self.examples, head, kinds_of, count, self.device)
            places = mixed(read, kinds)
            counted = read[(kinds >= 0) & (kinds < count)]
            alone = int(counted[-1]) if len(counted) else alone
        return list(read_trials(self.examples, places, alone, self.limit, self.device))

    def _inputs(self, task: Task, trial: Trial) -> object:
        return in_precision_of(self.model, task.inputs(trial.batch))

    def _read(self, task: Task, trial: Trial) -> tuple[Tensor, Tensor]:
        """Outputs and encoded targets, shape ``(B, C)``."""
        with uncompiled():
            outputs = columns(task.outputs(self.model, self._inputs(task, trial)))
        targets = required(task.targets(trial.batch))
        encoded = task.encode(targets, outputs.shape[-1])
        return outputs, encoded.to(torch.promote_types(encoded.dtype, outputs.dtype))

    def _check_ignored(self, task: Task, trial: Trial) -> None:
        """Refuse targets out of range, naming the example, where training does not ignore them but fails."""
        if isinstance(task, Classification) and task.ignore_index is not None:
            with self.examples.naming(trial.places):
                self._read(task.changed(ignore_index=None), trial)

    def _check_finite(self, task: Task, trial: Trial) -> None:
        """Refuse data that are not finite, naming the example."""
        try:
            outputs, encoded = self._read(task, trial)
        except Exception:  # of the module, not of the data
            return
        with self.examples.naming(trial.places):
            check_finite(outputs, "outputs")
            check_finite(encoded, "target")

    def _compared(self, task: Task, gradients: StepGradients) -> Agreement | None:
        """The task in the unit of the module's own loss, if gradients agree."""

        def losses(trial: Trial) -> list[Tensor]:
            return [task.loss(*self._read(task, trial)).sum()]

        def of_task(settings: Sequence[Setting]) -> dict[tuple[Setting, int], Tensor]:
            return {key: values[0] for key, values in gradients.of_losses(losses, settings).items()}

        try:
            with torch.no_grad():
                weights = [task.example_weights(self._read(task, trial)[1]) for trial in gradients.trials]
            first, *others = gradients.settings
            ours = of_task([first])
            ways = [way for way in self._divisors(gradients.trials, weights) if gradients.factor(ours, way[2])]
            ours |= of_task(others) if ways else {}
        except (TypeError, ValueError):  # a target that the task does not take
            return None
        for is_normalised, divides, divisors in ways:
            if (factor := gradients.factor(ours, divisors)) is not None:
                factor = plain(factor, gradients.rounding)
                agreed = task.changed(is_normalised=is_normalised).with_scale(factor)
                return Agreement(agreed, f"{agreed!r} agrees with training_step: {factor:.6g} times its {divides}")
        return None

    def _divisors(self, trials: Sequence[Trial], weights: Sequence[Tensor]) -> Iterator[tuple[bool, str, list[float]]]:
        """Ways in which a batch's loss is made of those of examples."""
        sums, sizes = [float(weight.sum()) for weight in weights], [float(len(trial)) for trial in trials]
        every = torch.cat(list(weights))
        if bool((every != every[0]).any()):
            yield True, "mean over examples, by their weights", sums
        yield False, "mean over examples", sizes
        yield False, "sum over examples (scores are those of the sum's terms)", [1.0] * len(sizes)


def _sentence(error: Exception) -> str:
    """The first sentence of an error, without the advice that follows."""
    return first_line(error).partition(". ")[0]
