"""retrain() and retrain_without(): ground truth from training many models."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from stride_lightning.results.attribution import Attribution
from stride_lightning.results.top_attribution import TopAttribution
from stride_lightning.retraining.batchability import vectorised_attention
from stride_lightning.retraining.ground_truth import Counterfactual, GroundTruth, Retrained
from stride_lightning.retraining.one_by_one import train_alone
from stride_lightning.retraining.optimizers import CannotBatch
from stride_lightning.retraining.recipe import Recipe, Training
from stride_lightning.retraining.together import Together
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.progress import announce, on_one_bar
from stride_lightning.runtime.randomness import mix
from stride_lightning.runtime.versions import versions
from stride_lightning.storage.parts import Work

Truth = TypeVar("Truth", bound=Retrained)


@on_one_bar
def retrain(
    model_fn: Callable[[], nn.Module],
    queries: Any,
    *,
    train_data: Any,
    max_epochs: int,
    num_subsets: int | None = None,
    fraction: float = 0.5,
    num_seeds: int = 2,
    seed: int = 0,
    path: str | Path | None = None,
    masks: Tensor | None = None,
    show_progress: bool = True,
    **how: Unpack[Training],
) -> GroundTruth:
    """Losses of queries, or a measure of them, under models trained from scratch on random subsets of the data.

    All subsets of a seed share the initial weights and the order of batches; each model skips the examples outside its
    subset. Models train together if ``torch.func`` can vectorise them. Otherwise they train one by one, each with a
    fresh Trainer, and the reason is printed. In a distributed run the processes share the work.

    Args:
        model_fn: Makes a fresh, untrained model: a class, or a function without arguments.
        queries: The examples to measure: a Dataset, DataLoader or LightningDataModule.
        train_data: The training data, likewise. Its DataLoader gives batch size and shuffling. A LightningDataModule
            also gives validation data to models that train one by one, for schedules and callbacks that need them.
        max_epochs: Passes over the training data.
        num_subsets: Number of subsets K; 100 by default.
        fraction: Share of the training examples in each subset.
        num_seeds: Models per subset; they differ in initial weights and order. Two or more give a noise ceiling.
        seed: Seed of the subsets and of all other random numbers.
        path: Folder for the result. Until the end, ``<path>.parts`` holds finished parts of 16 models or more. A killed
            run that is started again continues from there, with the same result.
        masks: Subsets to use instead of random ones, bool of shape ``(K, n)``.
        show_progress: Show a progress bar, and the reason why models train one by one.
        **how: How to train: ``batch_size``, ``optimizer``, ``trainer_fn``, ``task``, ``loss``, ``measure``,
            ``train_indices``, ``device``, ``memory_budget``, ``one_by_one``; see
            :class:`~stride_lightning.retraining.recipe.Training`.

    Returns:
        Masks, losses and noise ceiling.

    Raises:
        TypeError, ValueError: If an argument cannot work, or training diverges; the message names the argument, or
            subset and seed.
        RecordError: If a stored result is damaged.

    Example:
        >>> from functools import partial
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = TensorDataset(x, (x[:, 0] > 0).long())
        >>> truth = retrain(
        ...     lambda: nn.Linear(3, 2), data, train_data=data, max_epochs=2, batch_size=10, num_subsets=6,
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ... )
        >>> truth.masks.shape, truth.losses.shape
        (torch.Size([6, 40]), torch.Size([6, 40]))

    Reference: arXiv:2202.00622 (datamodels), section 2.
    """
    seeds = _seeds(seed, num_seeds)
    _check_names(retrain, how)
    recipe = Recipe(model_fn, queries, train_data=train_data, max_epochs=max_epochs, **how)
    if masks is None:
        masks = sample_masks(len(recipe.train), 100 if num_subsets is None else num_subsets, fraction, seed=seed)
    elif num_subsets is not None:
        raise ValueError("Give either `masks` or `num_subsets`: the masks are the subsets.")
    return _measured(GroundTruth, recipe, _checked_masks(masks, len(recipe.train)), seeds, path, show_progress)


@on_one_bar
def retrain_without(
    attribution: Attribution | TopAttribution,
    model_fn: Callable[[], nn.Module],
    queries: Any,
    *,
    train_data: Any,
    max_epochs: int,
    ks: int | Sequence[int] = (1, 10, 100),
    num_seeds: int = 2,
    seed: int = 0,
    path: str | Path | None = None,
    show_progress: bool = True,
    **how: Unpack[Training],
) -> Counterfactual:
    """Losses of each query under models trained without the examples with the highest scores for it.

    Each seed trains ``len(ks) * q + 1`` models. If the scores are right, losses rise with k.

    Args:
        attribution: The scores. The lower position wins ties.
        model_fn: Makes a fresh, untrained model.
        queries: The queries of the attribution.
        train_data: The training data of the attribution.
        max_epochs: Passes over the training data.
        ks: Numbers of examples to remove, each below the number of training examples.
        num_seeds: Models per removal.
        seed: Seed of all random numbers.
        path: Folder for the result, as in :func:`retrain`.
        show_progress: As in :func:`retrain`.
        **how: How to train, as in :func:`retrain`; see :class:`~stride_lightning.retraining.recipe.Training`.

    Returns:
        Losses with all training examples, and without each query's top k.

    Reference: arXiv:2303.14186 (TRAK), section 5.2.
    """
    if isinstance(attribution, TopAttribution):
        raise ValueError(attribution.why_no_scores)
    if not isinstance(attribution, Attribution):
        raise TypeError(
            f"`attribution` must be an Attribution, got {type(attribution).__name__}. Wrap scores in "
            "Attribution(scores)."
        )
    if bad := _not_finite(attribution.scores):
        raise ValueError(
            f"The scores of queries {bad[:10]} are not finite. Leave out these queries, or mend the scores."
        )
    _check_names(retrain_without, how)
    recipe = Recipe(model_fn, queries, train_data=train_data, max_epochs=max_epochs, **how)
    num_train, num_queries = len(recipe.train), len(recipe.queries)
    if (attribution.num_queries, attribution.num_train) != (num_queries, num_train):
        raise ValueError(
            f"The attribution has {attribution.num_queries} queries and {attribution.num_train} training examples, but "
            f"{num_queries} queries and {num_train} training examples were given. Pass the data of the attribution."
        )
    positions = recipe.train.positions
    if not torch.equal(attribution.train_indices.sort().values, positions.sort().values):
        raise ValueError(
            "The attribution's train_indices are not the positions of the training data. Pass the training data of the "
            "attribution."
        )
    # Put the columns in the reading order of the training data.
    scores = attribution.scores[:, attribution.train_indices.argsort()[positions.argsort().argsort()]]
    ks = [ks] if isinstance(ks, int) else sorted(set(ks))
    if not ks or ks[0] < 1 or ks[-1] >= num_train:
        raise ValueError(f"`ks` must be numbers from 1 to {num_train - 1}, got {ks}.")
    order = scores.argsort(dim=1, descending=True, stable=True)
    removed = [torch.ones(num_queries, num_train, dtype=torch.bool).scatter_(1, order[:, :k], False) for k in ks]
    masks = torch.cat([torch.ones(1, num_train, dtype=torch.bool), *removed])
    seeds = _seeds(seed, num_seeds)
    return _measured(Counterfactual, recipe, masks, seeds, path, show_progress, attribution=attribution, ks=ks)


def sample_masks(num_train: int, num_subsets: int, fraction: float = 0.5, *, seed: int = 0) -> Tensor:
    """Random subsets of equal size, bool of shape ``(num_subsets, num_train)``."""
    num_subsets = check_count("num_subsets", num_subsets, 2)
    size = round(fraction * num_train)
    if not 0 < fraction < 1 or not 0 < size < num_train:
        raise ValueError(
            f"`fraction` must be between 0 and 1 and leave some of the {num_train} training examples in and some out, "
            f"got {fraction}."
        )
    generator = torch.Generator().manual_seed(mix(seed))
    ranks = torch.stack([torch.randperm(num_train, generator=generator) for _ in range(num_subsets)])
    return ranks < size


def _check_names(caller: Callable[..., Any], how: Mapping[str, Any]) -> None:
    if unknown := sorted(how.keys() - Training.__annotations__.keys()):
        known = sorted({*inspect.signature(caller).parameters, *Training.__annotations__} - {"how"})
        raise TypeError(
            f"{caller.__name__}() has no argument {', '.join(unknown)}. Its arguments are: {', '.join(known)}."
        )


def _measured(
    kind: type[Truth],
    recipe: Recipe,
    masks: Tensor,
    seeds: list[int],
    path: str | Path | None,
    show_progress: bool,
    *,
    attribution: Attribution | None = None,
    **more: Any,
) -> Truth:
    """Train a model on every subset with every seed, and store the result at ``path``."""
    started = time.perf_counter()
    identity = recipe.identity(seeds)
    if attribution is not None:
        planned = Retrained(masks, torch.zeros(len(seeds), len(masks), 1), seeds, identity)
        planned.check_data(attribution.metadata)
        planned.check_measure(attribution.metadata)
    work = Work(path, identity, {"masks": masks})
    if (finished := work.finished(kind)) is not None:
        return finished
    recipe.check_queries(recipe.initial_model(seeds[0]))
    if len(seeds) > 1 and len(set(identity["initial_weights"])) == 1:
        warnings.warn(
            "`model_fn` gives the same initial weights with every seed, because it sets a seed or loads weights. Seeds "
            "then differ only in the order of batches, and the noise ceiling covers only that. If the weights were "
            "trained on these data, this is no retraining: make a fresh model in `model_fn`.",
            stacklevel=3,
        )
    try:
        together = Together(recipe, seeds[0])
        together.check_steps(masks, seeds)
    except CannotBatch as reason:
        together, recipe.one_by_one_because = None, str(reason)
        announce(
            f"Copies of the model train one by one, each with a fresh Trainer, because {reason}.", show=show_progress
        )

    def losses_of(seed: int, subsets: slice, tick: Callable[[int], Any]) -> Tensor:
        chunk = masks[subsets]
        if together:
            losses = together.train(chunk, seed, tick)
        else:
            losses = torch.stack([train_alone(recipe, mask, seed) for mask in chunk])
            tick(len(chunk) * recipe.max_epochs)
        _check_losses(losses, subsets.start, seed)
        return losses

    work.plan["together"] = together is not None  # results differ by rounding, so parts of both kinds must not mix
    with vectorised_attention() if together else nullcontext():
        losses = work.run(
            losses_of,
            seeds=seeds,
            num_items=len(masks),
            largest=recipe.chunk_size(len(masks)),
            num_threads=recipe.num_threads,
            ticks=lambda num_models: num_models * recipe.max_epochs,
            description="Retraining (models x epochs)",
            show_progress=show_progress,
        )
    how = {"one_by_one_because": recipe.one_by_one_because, "seconds": time.perf_counter() - started}
    metadata = {**identity, **recipe.own_loss, **how, "versions": versions(), "chunk_size": work.chunk_size}
    return work.keep(kind(masks, losses, seeds, metadata, **more))


def _checked_masks(masks: Tensor, num_train: int) -> Tensor:
    masks = torch.as_tensor(masks)
    if masks.ndim != 2 or masks.shape[1] != num_train or not ((masks == 0) | (masks == 1)).all():
        raise ValueError(
            f"`masks` must hold 0 and 1, in shape (num_subsets, {num_train}) with a column per training example, got "
            f"{masks.dtype} {tuple(masks.shape)}."
        )
    if empty := (~masks.bool().any(1)).nonzero().flatten().tolist():
        raise ValueError(f"Every subset in `masks` needs an example, but these have none: {empty[:10]}.")
    return masks.bool().cpu()


def _check_losses(losses: Tensor, start: int, seed: int) -> None:
    if bad := _not_finite(losses):
        raise ValueError(
            f"Training on subset {start + bad[0]} with seed {seed} gave losses that are not finite for queries "
            f"{_not_finite(losses[bad[0], :, None])[:5]}. Did training diverge? Lower the learning rate, and check the "
            "training data for NaN."
        )


def _not_finite(values: Tensor) -> list[int]:
    """Rows with a value that is not finite."""
    return (~torch.isfinite(values)).any(1).nonzero().flatten().tolist()


def _seeds(seed: int, num_seeds: int) -> list[int]:
    first = check_count("seed", seed, 0)
    return list(range(first, first + check_count("num_seeds", num_seeds)))
