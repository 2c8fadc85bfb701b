"""The front door: attribute() and self_influence(), and the methods by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.attributor import Attributor
from stride_lightning.data.sources import resolve_queries
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.top_attribution import TopAttribution
from stride_lightning.runtime.metering import Meter
from stride_lightning.runtime.progress import call
from stride_lightning.tasks.likelihoods import Task

#: The files whose classes enter themselves among the methods when they are imported.
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
    task: Task | None = None,
    target: str = "label",
    train_indices: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    seed: int = 0,
    show_progress: bool = True,
    **options: Any,
) -> Attribution | TopAttribution:
    """Which training examples made the model do this?

    In a distributed run every rank may call it: the work is shared and all return the same result. The caller's
    weights, mode, hooks and device are as before afterwards.

    Args:
        model: A LightningModule or any other module; it is evaluated in eval mode (dropout off, BatchNorm fixed).
        queries: What to explain: a Dataset, a DataLoader, or a LightningDataModule (its test data, else its
            validation data).
        train_data: What the model was trained on: a Dataset, a DataLoader or a LightningDataModule.
        method: Name of the method; see :func:`methods`.
        ckpt_path: Checkpoint whose weights are attributed, or ``"best"`` or ``"last"`` of the model's trainer. By
            default the weights as they are.
        weights_only: As in ``torch.load`` and Lightning: None leaves it to torch, which loads tensors and plain values
            alone. False loads checkpoints that hold other objects, such as a module among the hyper-parameters; that
            may run code stored in the file, so pass it for files you trust.
        record: A record that a callback wrote, or the folder that holds records. By default the callback's state in
            the checkpoint or the attached trainer says where records are, and the one of these weights is used; if
            there is none, everything is computed on the spot and the metadata says so.
        task: What a batch means; inferred from the first batch by default.
        target: ``"label"``, or ``"predicted"`` for queries without labels.
        train_indices: Positions in the dataset that were trained on, where the sampler does not tell.
        batch_size: Examples per forward pass; changes nothing but rounding.
        device: Where to compute; the model's device by default.
        seed: Seed of everything random that is not read from a record.
        show_progress: Show how far the call is, in which phase, and how much time is left.
        **options: Options of the method, such as ``num_subsets``, ``layers``, ``basis``, ``recovery``.

    Returns:
        Scores of shape ``(num_queries, num_train)`` and all that can be done with them; positive is helpful. Their unit
        is the method's: see its class. With ``top_k=`` only the top of each query, as a ``TopAttribution``.

    Raises:
        TypeError: If an option is unknown or the data are not map-style.
        ValueError: If record, weights and data do not belong together, or something is not finite.

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
    with call(show=show_progress), Meter() as meter:
        attributor = create(method, seed=seed, batch_size=batch_size, show_progress=show_progress, **options)
        examples = resolve_queries(queries, model)  # before the fit, whose work it may take hours to do again
        attributor.expected_queries = len(examples)
        attributor.fit(
            model,
            train_data,
            task,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
            record=record,
            train_indices=train_indices,
            device=device,
        )
        attribution = attributor.attribute(examples, target=target)
    attribution.metadata["peak_memory_bytes"] = meter.peak_memory  # of both: what the first holds counts in the second
    return attribution


def self_influence(
    model: nn.Module,
    *,
    train_data: Any,
    method: str = "stride",
    ckpt_path: str | Path | None = None,
    weights_only: bool | None = None,
    record: str | Path | None = None,
    task: Task | None = None,
    train_indices: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    seed: int = 0,
    show_progress: bool = True,
    **options: Any,
) -> Tensor:
    """How much did training on each example help the model with that very example?

    Where this is high, the model has memorised the example: it owes its answer to this one more than to others. Sorted
    from high to low, mislabelled and unusual examples come first, which makes it a way to find wrong labels;
    :func:`~stride_lightning.metrics.mislabel_detection` says how well. Arguments as in :func:`attribute`.

    Returns:
        float32, shape ``(num_train,)``, in the unit of the method: the score of each training example for itself, the
        diagonal of the attribution of the training data to themselves; in the order of ``train_indices``, by default
        that of the dataset. A method that scores only some examples (``left_out``) gives those, in that order. What a
        method chooses over all queries of a call, such as the penalty of a lasso, it chooses for each ``batch_size``.

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
            ckpt_path=ckpt_path,
            weights_only=weights_only,
            record=record,
            train_indices=train_indices,
            device=device,
        )
        return attributor.self_influence()


def methods() -> list[str]:
    """Names of all methods, those of your own included."""
    for home in _HOMES:
        import_module(f"stride_lightning.{home}")
    return sorted(Attributor.registry)


def class_of(method: str) -> type[Attributor]:
    """The class of a method; wrong names are refused with the right ones."""
    if method not in (known := methods()):
        raise ValueError(f"Unknown method {method!r}. Known: {', '.join(known)}.")
    return Attributor.registry[method]


def create(method: str, **options: Any) -> Attributor:
    """The attributor of that name with these options; wrong names are refused with the right ones.

    Example:
        >>> create("ekfac", damping=0.3).method
        'ekfac'
    """
    cls = class_of(method)
    known = _options(cls)
    if unknown := sorted(options.keys() - known):
        raise TypeError(
            f"Unknown option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)} for method {method!r}. "
            f"Its options are: {', '.join(sorted(known - _options(Attributor)))}."
        )
    return cls(**options)


def _options(cls: type[Attributor]) -> set[str]:
    """Names of the keyword arguments of a method, those it hands on to its base classes as ``**kwargs`` too."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            signature = inspect.getfullargspec(base.__init__)
            names.update(signature.args[1:], signature.kwonlyargs)
            if signature.varkw is None:
                break
    return names
