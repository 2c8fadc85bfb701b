"""Inferring the task of a batch, and checks of models and outputs."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.model.layers import in_precision_of
from stride_lightning.tasks.counts import PoissonRegression
from stride_lightning.tasks.dense import DenseClassification
from stride_lightning.tasks.language import CausalLanguageModeling, SequenceClassification, TokenClassification
from stride_lightning.tasks.likelihoods import (
    HOW_TO_PASS_TASK,
    BinaryClassification,
    Classification,
    Regression,
    Task,
    check_rows,
    describe,
)
from stride_lightning.tasks.parts import Parts
from stride_lightning.tasks.texts import logits_of

#: Most items of a dictionary among which inputs and targets are looked for.
MOST_ITEMS = 6


def infer_task_of(batch: Any, model: nn.Module) -> Task:
    """The built-in task that fits the first batch, or an error that says how to pass one.

    Integer targets of shape ``(B,)`` and two or more outputs are a classification; integers 0 and 1 with a single
    output are binary; float targets of the outputs' shape are a regression. Dictionaries with ``input_ids`` are texts:
    language modeling if the model gives logits for every token, else classification. The model must be in eval mode.

    Raises:
        TypeError: If the batch or the outputs have a form no built-in task reads.
        ValueError: If targets and outputs fit no task, or several.
    """
    check_forward(model)
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return _infer_language_task(batch, model)
    reader = Classification()
    targets, inputs = reader.targets(batch), in_precision_of(model, reader.inputs(batch))
    if not isinstance(targets, Tensor) or targets.ndim == 0:
        raise TypeError(f"A batch of {describe(batch)} does not say its task. {HOW_TO_PASS_TASK}")
    with torch.no_grad():
        outputs = reader.outputs(model, inputs)
    if isinstance(outputs, Tensor) and outputs.ndim == 3 and targets.shape == outputs.shape[:2]:
        task = CausalLanguageModeling()
        task.targets(batch)
        return _checked(task, outputs)
    check_outputs(outputs, len(targets))
    num_outputs = 1 if outputs.ndim == 1 else outputs.shape[1]
    both = f"targets {describe(targets)} and outputs {describe(outputs)}"
    if not targets.is_floating_point():
        check_rows(
            targets >= 0,
            targets,
            "and a negative target often marks an example that training ignores. Leave such examples out: "
            f"torch.utils.data.Subset(dataset, positions). Or say what the target means. {HOW_TO_PASS_TASK}",
        )
        if num_outputs >= 2 and targets.ndim == 1:
            reader.encode(targets, num_outputs)
            return _checked(reader, outputs)
        if num_outputs == 1 and targets.numel() == len(targets) and int(targets.max()) <= 1:
            if ((outputs >= 0) & (outputs <= 1)).all():
                warnings.warn(
                    "The model's outputs all lie between 0 and 1 and are read as logits. If they are probabilities "
                    "(after a sigmoid), the scores would be wrong: pass a task whose `outputs` returns logits. "
                    + HOW_TO_PASS_TASK,
                    stacklevel=2,
                )
            return BinaryClassification()
        raise ValueError(f"No built-in task has {both}. {HOW_TO_PASS_TASK}")
    if targets.numel() != outputs.numel():
        raise ValueError(f"No built-in task has {both}: float targets need one output each. {HOW_TO_PASS_TASK}")
    if ((targets == 0) | (targets == 1)).all():
        raise ValueError(
            f"All float targets of the first batch are 0 or 1 ({both}): regression and (one-hot or binary) "
            f"classification look the same here. {HOW_TO_PASS_TASK}"
        )
    if num_outputs >= 2 and (targets >= 0).all() and torch.allclose(targets.sum(1), targets.new_ones(())):
        raise ValueError(f"Float targets that sum to 1 look like soft labels ({both}). {HOW_TO_PASS_TASK}")
    return Regression()


def likely_tasks(model: nn.Module, batch: Any) -> Iterator[Task]:
    """Built-in tasks that may read a batch, by the shapes of targets and outputs; whether one is right is not checked.

    An error of the model's own forward pass is raised where a batch is ``(inputs, targets)``.
    """
    check_forward(model)
    if isinstance(batch, Mapping) and "input_ids" in batch:
        yield CausalLanguageModeling()
        yield CausalLanguageModeling("sum", normalised=True)
        yield TokenClassification()
        yield TokenClassification("sum", normalised=True)
        yield SequenceClassification()
        return
    for parts in _likely_parts(model, batch):
        reader = Regression().changed(parts=parts)
        try:
            inputs = in_precision_of(model, reader.inputs(batch))
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a model that takes other inputs than are tried
                returned: Any = Task.outputs(reader, model, inputs)
        except Exception:
            if parts is None and len(batch) == 2:
                raise
            continue
        unweighted = None if parts is None else replace(parts, weights=None)
        targets = reader.changed(parts=unweighted).targets(batch)
        for output in _outputs_in(returned):
            which = parts if output is None else replace(parts or Parts((0,), 1), output=output)
            outputs = returned if output is None else returned[output]
            if outputs.ndim and isinstance(targets, Tensor) and targets.ndim:
                yield from (task.changed(parts=which) for task in _tasks_of(targets, outputs))


def _outputs_in(returned: Any) -> list[Any]:
    """Where outputs may stand in what a model returns; None for all of it."""
    if isinstance(returned, Tensor):
        return [None]
    pairs = returned.items() if isinstance(returned, Mapping) else enumerate(returned)
    return [key for key, value in pairs if isinstance(value, Tensor)]


def _tasks_of(targets: Tensor, outputs: Tensor) -> Iterator[Task]:
    """Tasks by the shapes of targets and outputs."""
    size, width = len(outputs), outputs.shape[1] if outputs.ndim == 2 else 1
    if len(targets) != size or not outputs.is_floating_point():
        return
    if outputs.ndim > 2 and not targets.is_floating_point():
        yield from _dense_tasks_of(targets, outputs)
    is_whole = not targets.is_floating_point() or bool((targets % 1 == 0).all())
    if width >= 2 and targets.numel() == size and is_whole:
        outside = targets[(targets < 0) | (targets >= width)].unique()
        if len(outside) <= 1:
            yield Classification(ignore_index=int(outside[0]) if len(outside) else None)
    if width >= 2 and targets.is_floating_point() and targets.shape == outputs.shape:
        yield Classification(soft_labels=True)
    if targets.numel() == outputs.numel():
        if bool(((targets == 0) | (targets == 1)).all()):
            yield BinaryClassification()
        yield Regression()
        if bool((targets >= 0).all()):
            yield PoissonRegression()


def _dense_tasks_of(targets: Tensor, outputs: Tensor) -> Iterator[Task]:
    places = targets.shape[1:]
    for classes_last in (False, True):
        shape = outputs.shape[1:-1] if classes_last else outputs.shape[2:]
        count = outputs.shape[-1 if classes_last else 1]
        outside = targets[(targets < 0) | (targets >= count)].unique()
        if count < 2 or places not in (shape, (1, *shape)) or len(outside) > 1:
            continue
        if classes_last and outputs.ndim == 3:
            yield CausalLanguageModeling()
            yield CausalLanguageModeling("sum", normalised=True)
        ignored: dict[str, Any] = {"ignore_index": int(outside[0])} if len(outside) else {}
        yield DenseClassification(classes_last=classes_last, **ignored)
        yield DenseClassification("sum", classes_last=classes_last, normalised=True, **ignored)


def _likely_parts(model: nn.Module, batch: Any) -> Iterator[Parts | None]:
    """Where inputs, targets and weights may stand in a batch; None for ``(inputs, targets)``."""
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in positional if p.default is p.empty]
    if isinstance(batch, tuple | list) and batch:
        last = len(batch) - 1
        if last >= 1 and len(required) <= 1:
            yield None
        if last == 2 and len(required) <= 1 and _is_weight(batch[last]):
            yield Parts((0,), 1, 2)
        if last >= 2 and len(required) <= last <= len(positional):
            yield Parts(tuple(range(last)), last)
        if last == 1 and isinstance(batch[0], tuple | list) and len(required) <= len(batch[0]) <= len(positional):
            yield Parts(tuple((0, number) for number in range(len(batch[0]))), 1)
        if len(required) <= 1:
            yield Parts((0,), 0)  # an autoencoder
    if isinstance(batch, Mapping):
        tensors = [name for name, value in batch.items() if isinstance(value, Tensor)]
        for target in tensors:
            others = [name for name in tensors if name != target and batch[name].is_floating_point()]
            if required and all(name in batch for name in required):
                yield Parts(tuple(required), target)
            elif len(required) == 1:
                yield from (Parts((name,), target) for name in others if len(tensors) <= MOST_ITEMS)
                yield Parts((), target)


def _is_weight(value: Any) -> bool:
    """Whether a batch's item may be a weight for each example."""
    return isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point() and bool((value >= 0).all())


def _infer_language_task(batch: Mapping[str, Any], model: nn.Module) -> Task:
    task = CausalLanguageModeling()
    task.check_batch(model, batch)
    with torch.no_grad():
        outputs = logits_of(model, task.inputs(batch))
    if outputs.ndim == 3:
        task.targets(batch)  # which refuses labels of another task
        return _checked(task, outputs)
    labels = batch.get("labels", batch.get("label"))
    if labels is None or (labels.ndim == 1 and not labels.is_floating_point() and outputs.shape[1] >= 2):
        return SequenceClassification()
    raise ValueError(
        f"No built-in task has labels {describe(labels)} and outputs {describe(outputs)}. {HOW_TO_PASS_TASK}"
    )


def _checked(task: Task, outputs: Tensor) -> Task:
    """The task, if its outputs are not probabilities."""
    if (outputs >= 0).all() and torch.allclose(outputs.sum(-1), outputs.new_ones(()), atol=1e-3):
        raise ValueError(
            "The model's outputs look like probabilities (non-negative rows that sum to 1), not logits. Pass a task "
            "whose `outputs(model, inputs)` returns their logarithm or the layer before the softmax. "
            + HOW_TO_PASS_TASK
        )
    return task


def check_forward(model: nn.Module) -> None:
    """Refuse a module that defines no ``forward``."""
    model = getattr(model, "_orig_mod", model)
    if type(model).forward.__qualname__ in ("_forward_unimplemented", "LightningModule.forward"):
        raise ValueError(
            f"{type(model).__name__} defines no `forward`, so its outputs cannot be computed from a batch. Pass a task "
            f"whose `outputs(model, inputs)` calls the right method. {HOW_TO_PASS_TASK}"
        )


def check_task(task: object) -> None:
    """Refuse a task that is not an instance of Task."""
    if task is not None and not isinstance(task, Task):
        given = f"the class {task.__name__}; make an instance" if isinstance(task, type) else repr(task)
        raise TypeError(f"`task` must be an instance of Task, got {given}. {HOW_TO_PASS_TASK}")


def check_outputs(outputs: object, batch_size: int, task: Task | None = None) -> None:
    """Refuse outputs that are not one row of numbers per example, or per token if the task is one of tokens."""
    expected, dims = "The model's outputs must be a tensor of shape (B,) or (B, C)", (1, 2)
    if task is not None and task.has_tokens:
        expected, dims = f"A task of {task.name} expects logits of shape (B, T, V)", (3,)
    if not isinstance(outputs, Tensor) or outputs.ndim not in dims or len(outputs) != batch_size:
        raise TypeError(f"{expected} with B={batch_size} rows, got {describe(outputs)}. {HOW_TO_PASS_TASK}")
