"""further_train(): the gold standard of attribution to a final model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_look
from stride_lightning.data.objectives import check_objective, resolve_objective, says_rows_loss
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.model.checkpoints import load_checkpoint, resolve_ckpt_path, weights_in
from stride_lightning.model.weights import alone_with, borrowed, rank_zero_state, weight_hash
from stride_lightning.retraining.batchability import vectorised_attention
from stride_lightning.retraining.effects import FurtherTraining
from stride_lightning.retraining.leaving_out import LeavingOut
from stride_lightning.retraining.optimizers import MakeOptimizer
from stride_lightning.retraining.query_values import QueryValues
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.progress import announce, on_one_bar
from stride_lightning.runtime.versions import versions
from stride_lightning.storage.parts import Work
from stride_lightning.tasks.likelihoods import Task
from stride_lightning.tasks.measures import check_function
from stride_lightning.tasks.moments import moment_of
from stride_lightning.tasks.own_loss import OwnLoss, RowFunction

#: Largest number of examples to leave out by default.
NUM_LEFT_OUT = 100


@on_one_bar
def further_train(
    model: nn.Module,
    queries: Any,
    *,
    train_data: Any,
    epochs: int | Sequence[int] = 1,
    left_out: Sequence[int] | Tensor | None = None,
    num_seeds: int = 10,
    seed: int = 0,
    path: str | Path | None = None,
    ckpt_path: str | Path | None = None,
    weights_only: bool | None = None,
    batch_size: int | None = None,
    optimizer: MakeOptimizer | None = None,
    task: Task | OwnLoss | None = None,
    loss: RowFunction | None = None,
    measure: RowFunction | None = None,
    train_indices: Sequence[int] | Tensor | None = None,
    device: str | torch.device | None = None,
    memory_budget: int | None = None,
    show_progress: bool = True,
) -> FurtherTraining:
    """Train a final model further, with and without examples, and measure the effect on queries.

    An example is left out of every batch by subtracting its share of the training loss, ``l_i / n``; with and without
    it, a seed's batches and dropout are the same. Copies train together if ``torch.func`` can vectorise the model, else
    one by one, and the reason is printed. The model itself does not change. In a distributed run the processes share
    the work.

    A step is the optimizer's alone: gradients are not clipped, and hooks that change them are not called; a warning
    names these. Where no likelihood is the training loss, ``training_step`` gives it. An example's share is then what
    its kind of loss says: a mean, a sum, a mean with weights, or a loss that couples the examples of a batch.

    Args:
        model: The final model.
        queries: The examples to measure: a Dataset, DataLoader or LightningDataModule.
        train_data: The training data, likewise. Its DataLoader gives batch size and shuffling.
        epochs: Number of epochs of further training before effects are measured; one number or several.
        left_out: Positions in the training dataset; by default all, or 100 spread evenly if there are more.
        num_seeds: Number of orders of batches to average over. Ten to twenty are almost as good as a hundred.
        seed: The first of the seeds.
        path: Folder for the result. A killed run continues from ``<path>.parts``, parts of about a sixteenth of the
            work each.
        ckpt_path: Checkpoint of the final model, or ``"best"`` or ``"last"``; by default the model's present weights.
        weights_only: As in :func:`~stride_lightning.attribute`.
        batch_size: Examples of a batch.
        optimizer: Function that makes the optimizer of a model's parameters; by default the model's
            ``configure_optimizers`` without its schedule, at the initial learning rate.
        task: The meaning of a batch; by default inferred. ``OwnLoss()`` is the loss that ``training_step`` computes.
        loss: What training minimised, if ``training_step`` does not say it: ``fn(model, batch) -> (B,)``.
        measure: What is measured of the queries, ``fn(model, batch) -> (B,)`` with the model in eval mode; by default
            their loss. Positive effects raise it.
        train_indices: Positions in the dataset that the model trains on, if the sampler does not give them.
        device: Device of the training; by default the model's.
        memory_budget: Bytes for the copies that train together; by default 32 MiB on a CPU, 2 GiB on a GPU.
        show_progress: Show a progress bar, and the reason why copies train one by one.

    Returns:
        Effects of every example on every query, for every seed and amount of training.

    Raises:
        TypeError, ValueError: If an argument, the model or its loss cannot work (the message says how), a query's loss
            is not finite, or training diverges.
        RecordError: If a stored result is damaged.

    Example:
        >>> from functools import partial
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> data, sgd = TensorDataset(x, x.sum(1)), partial(torch.optim.SGD, lr=0.1)
        >>> result = further_train(nn.Linear(3, 1), data, train_data=data, batch_size=5, optimizer=sgd, num_seeds=2)
        >>> result.effects().shape
        torch.Size([20, 20])

    Reference: arXiv:2412.03906 (final-model-only data attribution), section 3.
    """
    if not isinstance(model, nn.Module):
        instead = f"the class {model.__name__}: make an instance" if isinstance(model, type) else repr(model)
        raise TypeError(f"`model` must be the final model, an instance of torch.nn.Module, got {instead}.")
    check_objective(task, loss)
    check_function(measure, "measure")
    num_seeds = check_count("num_seeds", num_seeds)
    with alone_with(model):
        checkpoint = None if ckpt_path is None else load_checkpoint(resolve_ckpt_path(ckpt_path, model), weights_only)
        state, note = (rank_zero_state(model), "") if checkpoint is None else weights_in(checkpoint, model)
        announce(f"{note}.", show=show_progress and bool(note))
        train = resolve_train_data(train_data, train_indices, model, has_rows_loss=says_rows_loss(task, loss))
        queries = resolve_queries(queries, model, train)
        with borrowed(model, state, None if device is None else torch.device(device)) as home, torch.no_grad():
            head = first_look(train, 64, home)
            moment = moment_of(model, checkpoint)
            objective = resolve_objective(model, train, home, task=task, loss=loss, moment=moment, batch_size=64)
            how: dict[str, Any] = {"batch_size": batch_size, "optimizer": optimizer, "memory_budget": memory_budget}
            how |= {"reason": objective.reason, "measure": measure, "moment": moment}
            leaving_out = LeavingOut(model, train, head, objective.task, **how)
            values = leaving_out.query_values(queries)
            weights = weight_hash(model)
        return measure_effects(
            leaving_out,
            queries,
            values,
            left_out=left_out,
            epochs=epochs,
            seeds=range(seed, seed + num_seeds),
            path=path,
            metadata={"weights": weights, "query_data": values.fingerprint},
            show_progress=show_progress,
        )


def measure_effects(
    leaving_out: LeavingOut,
    queries: Examples,
    values: QueryValues,
    *,
    left_out: Sequence[int] | Tensor | None,
    epochs: int | Sequence[int],
    seeds: Iterable[int],
    path: str | Path | None,
    metadata: Mapping[str, Any],
    show_progress: bool,
) -> FurtherTraining:
    """Measure all effects, part by part; arguments as in :func:`further_train`, and the values of queries."""
    started, train, seeds = time.perf_counter(), leaving_out.train, list(seeds)
    positions, places = find_left_out(left_out, train)
    amounts = read_amounts(epochs)
    check_count("num_seeds", len(seeds))
    identity = {**metadata, **leaving_out.identity(), "epochs": amounts, "seeds": seeds}
    if "data" not in identity:
        identity["data"] = leaving_out.fingerprint()
    work = Work(path, identity, {"left_out": positions})
    if (finished := work.finished(FurtherTraining)) is not None:
        return finished
    leaving_out.check_queries(queries, values)
    reason = leaving_out.one_by_one_because
    if reason:
        announce(f"Copies of the model train one by one, because {reason}.", show=show_progress)

    def effects_of(seed: int, chosen: slice, tick: Callable[[int], Any]) -> Tensor:
        return leaving_out.effects(places[chosen], values, amounts, seed, tick)

    with nullcontext() if reason else vectorised_attention():
        effects = work.run(
            effects_of,
            seeds=seeds,
            num_items=len(places),
            largest=leaving_out.chunk_size(len(places)),
            num_threads=leaving_out.num_threads,
            dim=1,
            ticks=lambda num_left_out: (num_left_out + 1) * amounts[-1],
            description="Further training (models x epochs)",
            show_progress=show_progress,
        )
    how = {"one_by_one_because": reason, "seconds": {"total": time.perf_counter() - started}, "versions": versions()}
    metadata = {**identity, **how, "chunk_size": work.chunk_size}
    return work.keep(FurtherTraining(effects, positions, amounts, seeds, metadata))


def read_amounts(epochs: int | Sequence[int]) -> list[int]:
    """The given numbers of epochs, ascending.

    Example:
        >>> read_amounts([5, 1]), read_amounts(3)
        ([1, 5], [3])
    """
    amounts = {check_count("epochs", amount) for amount in (epochs if isinstance(epochs, Iterable) else [epochs])}
    if not amounts:
        raise ValueError(f"`epochs` must be an integer or a list of at least one, got {epochs!r}.")
    return sorted(amounts)


def find_left_out(left_out: Sequence[int] | Tensor | None, train: Examples) -> tuple[Tensor, Tensor]:
    """Positions in the dataset of the examples to leave out, and their places in the reading order."""
    every = train.positions
    if left_out is None:
        places = torch.from_numpy(np.linspace(0, len(every) - 1, min(NUM_LEFT_OUT, len(every))).astype(np.int64))
        return every[places], places
    positions = read_positions(left_out)
    place_of = {position: place for place, position in enumerate(every.tolist())}
    wrong = [position for position in positions.tolist() if position not in place_of]
    if wrong or len(positions.unique()) < len(positions):
        problem = f"{wrong[:5]} are not among the {len(every)} training examples" if wrong else "it repeats some"
        raise ValueError(f"`left_out` must name each example once, by its position in the training dataset: {problem}.")
    return positions.long(), torch.tensor([place_of[position] for position in positions.tolist()])


def read_positions(left_out: Sequence[int] | Tensor) -> Tensor:
    """Positions of the examples to leave out, as integers."""
    try:
        positions = torch.as_tensor(left_out).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`left_out` must be integer positions in the training dataset, such as [3, 17], got {left_out!r}."
        ) from error
    if len(positions) == 0:
        raise ValueError(
            "`left_out` must name at least one example, got none. Without `left_out=`, all examples are left out in "
            "turn, or 100 spread evenly if there are more."
        )
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"`left_out` must be integer positions in the training dataset, got {positions.dtype}.")
    return positions
