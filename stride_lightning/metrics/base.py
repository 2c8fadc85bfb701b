"""The base of the metric classes: sums over batches and processes, and figures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from stride_lightning.metrics.checks import check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Reduction: TypeAlias = Literal["mean", "none"]


def reduce_over_queries(values: Tensor, reduction: Reduction, undefined: str, stacklevel: int = 3) -> Tensor:
    """The mean over queries, or the value of each; a query without a value counts 0, and a warning gives their number.

    Args:
        values: Shape ``(num_queries,)``, NaN where a query has no value.
        reduction: ``"mean"`` or ``"none"``.
        undefined: The reason why a query has no value, for the warning: ``"constant scores"``.
        stacklevel: The frame that the warning names, as in ``warnings.warn``; 3 is the caller's caller.

    Returns:
        A scalar, or shape ``(num_queries,)``.

    Raises:
        ValueError: If there is no such reduction.

    Example:
        >>> reduce_over_queries(torch.tensor([0.5, 1.0]), "mean", undefined="constant scores")
        tensor(0.7500)
    """
    check_choice("reduction", reduction, ("mean", "none"))
    num_undefined = int(values.isnan().sum())
    if num_undefined:
        warnings.warn(
            f"{num_undefined} of {len(values)} queries have {undefined} and count 0. Leave them out if they should not "
            "count.",
            stacklevel=stacklevel,
        )
    values = values.nan_to_num(nan=0.0)
    return values.mean() if reduction == "mean" else values


class AttributionMetric(Metric):
    """Base of the metrics of attribution scores.

    States are lists of one-dimensional tensors of the metric's dtype: rows of known width, one after the other.
    torchmetrics gathers an empty vector of that dtype from a process without data (and warns if that is rank 0). It
    could not know the width of a matrix.
    """

    higher_is_better: bool | None = True
    is_differentiable: bool | None = False
    full_state_update: bool | None = False
    state_dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states. It stays when the module around the metric is cast: bfloat16 would merge ranks."""
        return self.state_dtype

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw a value, a series of values, or the histogram of one value per query.

        Args:
            val: A result of ``compute`` or ``forward``, or a list of these; by default the result of ``compute``.
            ax: The axes to draw in; by default those of a new figure.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: If matplotlib is missing.
        """
        figure, axes = new_axes(ax)
        values = self.compute() if val is None else val
        if isinstance(values, Tensor) and values.ndim == 1:  # torchmetrics would draw a legend entry per query
            axes.hist(values.detach().cpu().numpy(), bins=30)
            axes.axvline(values.mean().item(), color="black", linestyle="dashed", label="mean")
            axes.set_xlabel(type(self).__name__)
            axes.set_ylabel("queries")
            axes.legend()
        else:
            self._plot(values, axes)
        return figure, axes

    def gathered(self, state: list[Tensor] | Tensor) -> Tensor:
        """A whole state, shape ``(num_entries,)``; after synchronisation that of all processes, in order of ranks.

        Raises:
            ValueError: If there has been no update.
        """
        if not len(state):
            raise ValueError(f"{type(self).__name__} has seen no data: call `update` first.")
        return dim_zero_cat(state)


class PerQueryMetric(AttributionMetric):
    """Base of the metrics that hold one number per query; all refuse options and batches that do not fit.

    Args:
        state: Name of the state. It must differ between any two metrics whose numbers can differ, for a
            ``MetricCollection`` takes metrics with the same states after one batch for the same metric.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.
        undefined: The reason why a query has no value, for the warning.
        kwargs: Passed to ``torchmetrics.Metric``.
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, state: str, reduction: Reduction, undefined: str = "no value", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("reduction", reduction, ("mean", "none"))
        self.reduction: Reduction = reduction
        self._state, self._undefined = state, undefined
        self.add_state(state, [], dist_reduce_fx="cat")

    def append(self, values: Tensor) -> None:
        """Store the numbers of a batch of queries, shape ``(num_queries,)``, NaN where a query has no value."""
        getattr(self, self._state).append(values.to(self.device, self.dtype))

    def compute(self) -> Tensor:
        """The mean over all queries so far, or the value of each in the order of updates (and ranks).

        Returns:
            A scalar, or shape ``(num_queries,)``; torchmetrics makes a scalar of the value of a single query.

        Raises:
            ValueError: If there has been no update.
        """
        values = self.gathered(getattr(self, self._state))
        return reduce_over_queries(values, self.reduction, self._undefined, stacklevel=4)


def new_axes(ax: Axes | None) -> tuple[Figure, Axes]:
    """The figure of the axes, and the axes; new ones for None.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    if ax is not None:
        return cast("Figure", ax.figure), ax
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Figures need matplotlib: pip install 'stride-lightning[plot]'.") from error
    return pyplot.subplots()
