"""Data read in order: encoded targets, what is found out in one pass, and what identifies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.data.fingerprints import Fingerprint
from stride_lightning.model.layers import in_precision_of
from stride_lightning.model.weights import borrowed
from stride_lightning.tasks.inference import check_outputs
from stride_lightning.tasks.likelihoods import Task, columns


def encoded_batch(
    model: nn.Module, task: Task, batch: Any, num_outputs: int, target: str = "label"
) -> tuple[Any, Tensor]:
    """Inputs and encoded targets of a batch, in the model's precision; or what the model itself predicts.

    Targets are encoded, and so checked, before any vectorised pass: checks look at values.
    """
    task.check_batch(model, batch)
    inputs, targets = in_precision_of(model, task.inputs(batch)), task.targets(batch)
    if target == "predicted":
        with torch.no_grad():
            outputs = task.outputs(model, inputs)
        targets = task.predict(columns(outputs))
    if targets is None:
        raise ValueError("The batch has no targets, so losses cannot be measured. Give every example a target.")
    encoded = task.encode(targets, num_outputs)
    if task.has_tokens:  # labels are numbers that half precision would round
        precise = in_precision_of(model, encoded)
        return inputs, precise if precise.dtype == torch.float64 else encoded
    return inputs, in_precision_of(model, encoded)


def encoded_batches(
    examples: Examples,
    model: nn.Module,
    task: Task,
    num_outputs: int,
    batch_size: int,
    device: torch.device,
    target: str = "label",
) -> list[tuple[Any, Tensor]]:
    """All batches of a data set as :func:`encoded_batch` gives them; an example that cannot be read is named."""
    encoded, start = [], 0
    for batch, _, length in examples.batches(batch_size, device):
        with examples.naming(start):
            encoded.append(encoded_batch(model, task, batch, num_outputs, target))
        start += length
    return encoded


def count_outputs(model: nn.Module, task: Task, batch: Any) -> int:
    """Number of outputs for one example; batches that the model cannot take and outputs of a wrong form are refused."""
    task.check_batch(model, batch)
    with borrowed(model, None, None), torch.no_grad():
        outputs = task.outputs(model, in_precision_of(model, task.inputs(batch)))
    check_outputs(outputs, len(outputs), task)
    return columns(outputs).shape[-1]


@dataclass
class Survey:
    """What one pass over a data set tells of it.

    Args:
        fingerprint: What identifies it.
        targets: Its targets, if every example has one number.
        kinds: What its examples are told apart by: these, or how much the tokens of each count.
    """

    fingerprint: dict[str, Any]
    targets: Tensor | None
    kinds: Tensor | None


def survey(examples: Examples, task: Task, model: nn.Module | None = None, num_outputs: int = 0) -> Survey:
    """Read a data set once.

    Args:
        examples: The data.
        task: What a batch means.
        model: Texts that it cannot take are refused.
        num_outputs: Its outputs.

    Raises:
        ValueError: Naming the text.
    """
    fingerprint, targets, start = Fingerprint(content=not examples.is_random), [], 0
    for batch, digests, length in examples.batches(1024, torch.device("cpu")):
        with examples.naming(start):
            target = task.targets(batch)
            if model is not None and task.has_padding and target is not None:
                encoded_batch(model, task, batch, num_outputs)
        fingerprint.update(digests, target)
        targets.append(target[..., 1].sum(1) if task.has_tokens and target is not None else target)
        start += length
    flat = [t.reshape(len(t), -1)[:, 0] for t in targets if t is not None and t.numel() == len(t)]
    kinds = torch.cat(flat) if len(flat) == len(targets) else None
    return Survey(fingerprint.summary(), None if task.has_tokens else kinds, kinds)


def fingerprint_of(examples: Examples, task: Task) -> dict[str, Any]:
    """What identifies a data set."""
    return survey(examples, task).fingerprint
