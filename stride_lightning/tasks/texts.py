"""Batches of texts: token ids, packed rows, and the logits that a model gives for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from stride_lightning.tasks.likelihoods import HOW_TO_PASS_TASK, describe


def token_ids(batch: Any) -> Tensor:
    """Integers of shape ``(B, T)``; a batch without them is refused."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    ids = ids[0] if isinstance(ids, tuple | list) and len(ids) > 0 else ids
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise TypeError(
            "A language model's batch is a dictionary with integer `input_ids` of shape (B, T), or a tensor of them; "
            f"got {describe(batch)}. {HOW_TO_PASS_TASK}"
        )
    return ids


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is one row of several sequences, whose positions start again at 0."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None or len(positions) != 1 or (mask is not None and not mask.all()):
        return False  # where there is padding, positions of 0 may be its
    return int((positions == 0).sum()) > 1


def unpack(packed: Any, positions: Tensor, fill: float) -> Any:
    """One row of concatenated sequences, shape ``(1, total)``, as rows padded by ``fill``, shape ``(B, T)``.

    ``positions`` are those of every token in its sequence. A value of another shape is returned as it is.

    Example:
        >>> import torch
        >>> unpack(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, 1]]), 0)
        tensor([[5, 0],
                [6, 7]])
    """
    if not isinstance(packed, Tensor) or packed.shape != positions.shape:
        return packed
    row = (positions[0] == 0).cumsum(0) - 1
    padded = packed.new_full((int(row[-1]) + 1, int(positions.max()) + 1), fill)
    padded[row, positions[0]] = packed[0]
    return padded


def logits_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The logits that a model gives for a batch without labels.

    Models that take ``input_ids`` by name, or any names, get the items that they take by name. Others get the token
    ids, or the whole dictionary if their argument is called ``batch``. An output without logits is a TypeError.
    """
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "input_ids" in parameters or takes_any:
        given = {name: value for name, value in inputs.items() if takes_any or name in parameters}
        if "use_cache" in parameters:
            given["use_cache"] = False  # keys and values of past tokens are for generating
        if "labels" in parameters and parameters["labels"].default is inspect.Parameter.empty:
            given["labels"] = inputs["input_ids"]
        call = partial(model, **given)
    else:
        first = next(iter(parameters), "")
        rest = {name: inputs[name] for name in list(parameters)[1:] if name in inputs}
        call = partial(model, dict(inputs) if first == "batch" else inputs["input_ids"], **rest)
    try:
        returned = call()
    except (KeyError, TypeError) as error:
        raise TypeError(
            f"{type(model).__name__}.forward({', '.join(parameters)}) was given what it names of a {describe(inputs)}, "
            f"or its token ids, and gave {type(error).__name__}: {error}. {HOW_TO_PASS_TASK}"
        ) from error
    logits = returned.get("logits") if isinstance(returned, Mapping) else getattr(returned, "logits", returned)
    if isinstance(logits, tuple | list):
        logits = next((value for value in logits if isinstance(value, Tensor) and value.ndim >= 2), None)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise TypeError(
            f"{type(model).__name__} gave {describe(returned)} for a batch of token ids, expected logits or an output "
            f"that has them. {HOW_TO_PASS_TASK}"
        )
    return logits


def vocabulary_size(model: nn.Module) -> int | None:
    """The number of token ids that a model knows; None where it does not say."""
    sizes = []
    for module in model.modules():
        find: Any = getattr(module, "get_input_embeddings", None)
        if find is not None:
            with suppress(NotImplementedError):
                sizes.append(getattr(find(), "num_embeddings", 0))
    return max(sizes, default=0) or None  # of several models the one that knows most


def max_length(model: nn.Module) -> int | None:
    """The number of tokens that a model takes; None where it does not say."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    limits = [getattr(config, "max_position_embeddings", None) for config in configs]
    return max((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def counts_positions(model: nn.Module) -> bool:
    """Whether a model looks positions up in a table and counts padding, as GPT-2 does."""
    return any(name.rpartition(".")[2] == "wpe" for name, _ in model.named_modules())
