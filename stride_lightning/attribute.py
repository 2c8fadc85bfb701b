"""The front door: attribute() and self_influence(), and the list of methods."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.attributor import Attributor
from stride_lightning.data.objectives import says_rows_loss
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.top_attribution import TopAttribution
from stride_lightning.runtime.distributed import leaving_together
from stride_lightning.runtime.metering import Meter
from stride_lightning.runtime.progress import call
from stride_lightning.tasks.likelihoods import Task
from stride_lightning.tasks.own_loss import OwnLoss, RowFunction

#: The modules with methods; importing them registers their classes.
_HOMES = (
    "gradients.plain",
    "gradients.presets",
    "information.attributor",
    "retraining.attributors",
    "steering.attributor",
)


def attribute(
    model: nn.Module,
    queries: Any,
    *,
    train_data: Any,
    method: str = "stride",
    ckpt_path: str | Path | None = None,
    weights_only: bool | None = None,
    record: str | Path | None = None,
    task: Task | OwnLoss | None = None,
    loss: RowFunction | None = None,
    measure: RowFunction | None = None,
    target: str = "label",
    train_indices: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    seed: int = 0,
    show_progress: bool = True,
    **options: Any,
) -> Attribution | TopAttribution:
    """Which training examples made the model do this?

    In a distributed run all ranks call it: they share the work and return the same result. Afterwards the model's
    weights, mode, hooks and device are as before.

    Args:
        model: A LightningModule or any other module; it is evaluated in eval mode (dropout off, BatchNorm fixed).
        queries: The examples to explain: a Dataset, a DataLoader, or a LightningDataModule (its test data, else its
            validation data).
        train_data: The training data of the model: a Dataset, a DataLoader, several of them (with ``loss=``) or a
            LightningDataModule. Iterable data are read once and held in memory.
        method: Name of the method; see :func:`methods`.
        ckpt_path: Checkpoint with the weights to attribute, or ``"best"`` or ``"last"`` of the model's trainer. By
            default the model's present weights.
        weights_only: As in ``torch.load`` and Lightning. None is torch's default, which loads only tensors and plain
            values. False also loads checkpoints with other objects, such as a module among the hyper-parameters. That
            may run code from the file, so pass it only for files you trust.
        record: A record that a callback wrote, or a folder of records. By default the checkpoint or the attached
            trainer names the records, and the one of these weights is used. Without one, everything is computed now,
            and the metadata says so.
        task: The likelihood that training maximised, or ``OwnLoss()`` for the loss of the module's own
            ``training_step``. By default a likelihood where it agrees with ``training_step``, else ``OwnLoss()``; the
            metadata say which under ``loss``.
        loss: What training minimised, in place of ``task``: ``loss(model, batch)`` returns the loss of each example,
            shape ``(B,)``.
        measure: What is explained of each query: ``measure(model, batch)`` returns a number for each query, shape
            ``(B,)``, such as the margin between two answers. A positive score raises it. By default the query's loss,
            which a positive score lowers.
        target: ``"label"``, or ``"predicted"`` for queries without labels.
        train_indices: Positions in the dataset that the model was trained on, if the sampler does not give them.
        batch_size: Examples per forward pass; changes nothing but rounding.
        device: Device of the computation; by default the model's.
        seed: Seed of all random numbers that are not read from a record.
        show_progress: Show a bar with the phase of the call and the time left.
        **options: Options of the method, such as ``num_subsets``, ``layers``, ``basis``, ``recovery``.

    Returns:
        Scores of shape ``(num_queries, num_train)``, with methods to view and save them; positive is helpful. The class
        of the method names their unit. With ``top_k=`` only the top of each query, as a ``TopAttribution``.

    Raises:
        TypeError: If an option is unknown or the data hold no examples.
        ValueError: If record, weights and data do not belong together, or a number is not finite.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> data = TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = nn.Linear(4, 2)
        >>> attribution = attribute(model, data, train_data=data, num_subsets=20, show_progress=False)
        >>> attribution.scores.shape
        torch.Size([60, 60])

    Reference: arXiv:2606.05165 (STRIDE).
    """
    with call(show=show_progress), Meter() as meter, leaving_together():
        attributor = create(method, seed=seed, batch_size=batch_size, show_progress=show_progress, **options)
        train_data = resolve_train_data(
            train_data, train_indices, model, has_rows_loss=says_rows_loss(task, loss), show=show_progress
        )
        # Before the fit, so that hours of work do not end in a refusal.
        examples = resolve_queries(queries, model, train_data, show=show_progress)
        attributor.expected_queries, attributor.known_queries = len(examples), examples
        attributor.fit(
            model,
            train_data,
            task,
            loss=loss,
            measure=measure,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
            record=record,
            device=device,
        )
        attribution = attributor.attribute(examples, target=target)
    attribution.metadata["peak_memory_bytes"] = meter.peak_memory  # of both: the fit's tensors count in the second
    return attribution


def self_influence(
    model: nn.Module,
    *,
    train_data: Any,
    method: str = "stride",
    ckpt_path: str | Path | None = None,
    weights_only: bool | None = None,
    record: str | Path | None = None,
    task: Task | OwnLoss | None = None,
    loss: RowFunction | None = None,
    train_indices: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    seed: int = 0,
    show_progress: bool = True,
    **options: Any,
) -> Tensor:
    """How much did training on each example help the model with that very example?

    A high value means that the model has memorised the example: its answer there depends on this example more than on
    others. Mislabelled and unusual examples tend to have the highest values, so sorting by them finds wrong labels;
    :func:`~stride_lightning.metrics.mislabel_detection` measures how well. Arguments as in :func:`attribute`.

    Returns:
        float32, shape ``(num_train,)``, in the unit of the method: the score of each training example for itself, which
        is the diagonal of the attribution of the training data to themselves (of ``"stride"``, in closed form and over
        one minus the leverage: the effect of leaving the example out). The order is that of ``train_indices``,
        by default that of the dataset. A method that scores only some examples (``left_out``) gives those, in their
        order. A method that chooses an option over all queries of a call, such as the penalty of a lasso, chooses it
        for every ``batch_size`` of them.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> data = TensorDataset(x, (x[:, 0] > 0).long())
        >>> self_influence(nn.Linear(4, 2), train_data=data, num_subsets=20, show_progress=False).shape
        torch.Size([60])

    Reference: arXiv:2002.08484 (TracIn), section 4.1.
    """
    with call(show=show_progress):
        attributor = create(method, seed=seed, batch_size=batch_size, show_progress=show_progress, **options)
        attributor.fit(
            model,
            train_data,
            task,
            loss=loss,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
            record=record,
            train_indices=train_indices,
            device=device,
        )
        return attributor.self_influence()


def methods() -> list[str]:
    """Names of all methods, including those that you defined."""
    for home in _HOMES:
        import_module(f"stride_lightning.{home}")
    return sorted(Attributor.registry)


def class_of(method: str) -> type[Attributor]:
    """The class of a method; the error about an unknown name lists all names."""
    if method not in (known := methods()):
        raise ValueError(f"Unknown method {method!r}. Use one of: {', '.join(known)}.")
    return Attributor.registry[method]


def create(method: str, **options: Any) -> Attributor:
    """The attributor of that name with these options.

    The error about an unknown option lists all options of the method, and the methods that have it.

    Example:
        >>> create("ekfac", damping=0.3).method
        'ekfac'
    """
    cls = class_of(method)
    known = _options(cls)
    if unknown := sorted(options.keys() - known):
        having = {name: [other for other in methods() if name in _options(class_of(other))] for name in unknown}
        elsewhere = [f" Methods with `{name}`: {', '.join(others)}." for name, others in having.items() if others]
        raise TypeError(
            f"Unknown option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)} for method {method!r}. "
            f"Its options are: {', '.join(sorted(known - _options(Attributor)))}.{''.join(elsewhere)}"
        )
    return cls(**options)


def _options(cls: type[Attributor]) -> set[str]:
    """Names of a method's keyword arguments, with those that it passes to its base classes as ``**kwargs``."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            signature = inspect.getfullargspec(base.__init__)
            names.update(signature.args[1:], signature.kwonlyargs)
            if signature.varkw is None:
                break
    return names
