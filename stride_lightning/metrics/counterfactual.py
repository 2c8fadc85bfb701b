"""The counterfactual score: the rise of a query's loss without the examples that helped it most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from stride_lightning.metrics.base import AttributionMetric, Reduction, new_axes
from stride_lightning.metrics.checks import check_choice, check_finite, check_shape, check_tensor
from stride_lightning.runtime.checks import check_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def counterfactual_score(losses_removed: Tensor, losses_full: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Rise in loss when a model is retrained without the k examples that score highest for a query, for several k.

    Args:
        losses_removed: Loss of each query under the model retrained without *its* top k examples, a row per k, shape
            ``(num_ks, num_queries)``.
        losses_full: Loss of each query under the model trained on everything, shape ``(num_queries,)``. Train it like
            the others (same seeds and steps). With several seeds, average both losses over them.
        reduction: ``"mean"`` over queries, or ``"none"``.

    Returns:
        Rise in the units of the loss, higher is better: shape ``(num_ks,)``, or ``(num_ks, num_queries)``.

    Raises:
        ValueError: If shapes do not fit or something is not finite.

    Example:
        >>> import torch
        >>> counterfactual_score(torch.tensor([[0.5, 0.25], [1.0, 0.5]]), torch.tensor([0.25, 0.25]))
        tensor([0.1250, 0.5000])

    Reference: arXiv:2202.00622 (datamodels); arXiv:2606.05165 (STRIDE), counterfactual evaluation.
    """
    check_choice("reduction", reduction, ("mean", "none"))
    check_tensor("losses_removed", losses_removed)
    if losses_removed.ndim != 2 or not losses_removed.numel():
        raise ValueError(
            "Expected `losses_removed` of shape (num_ks, num_queries) with at least one of each, "
            f"got {tuple(losses_removed.shape)}."
        )
    check_shape("losses_full", losses_full, losses_removed.shape[1:], "one loss for each column of `losses_removed`")
    check_finite("losses_removed", losses_removed, dim=1)
    check_finite("losses_full", losses_full)
    rises = (losses_removed.cpu().double() - losses_full.cpu().double()).float().to(losses_removed.device)
    return rises.mean(1) if reduction == "mean" else rises


class CounterfactualScore(AttributionMetric):
    """The counterfactual score over batches of queries, and over processes.

    Args:
        ks: How many examples were removed, growing: one for each row of the losses.
        reduction: ``"mean"`` over queries, or ``"none"``.
        kwargs: Passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``ks`` do not grow from at least 1, or a batch does not fit them.

    Example:
        >>> import torch
        >>> metric = CounterfactualScore(ks=[10, 100])
        >>> metric.update(torch.tensor([[0.5], [1.0]]), torch.tensor([0.25]))
        >>> metric.update(torch.tensor([[0.25], [0.5]]), torch.tensor([0.25]))
        >>> metric.compute()
        tensor([0.1250, 0.5000])

    Reference: arXiv:2202.00622 (datamodels); arXiv:2606.05165 (STRIDE), counterfactual evaluation.
    """

    rises: list[Tensor]

    def __init__(self, ks: Sequence[int], reduction: Reduction = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("reduction", reduction, ("mean", "none"))
        self.ks = tuple(ks)
        self.reduction: Reduction = reduction
        for k in self.ks:
            check_count("ks", k)
        if not self.ks or sorted(set(self.ks)) != list(self.ks):
            raise ValueError(f"Expected `ks` to be numbers of removed examples, each larger than the last, got {ks!r}.")
        self.add_state("rises", [], dist_reduce_fx="cat")

    def update(self, losses_removed: Tensor, losses_full: Tensor) -> None:
        """Add a batch of queries: losses of shape ``(num_ks, num_queries)`` and ``(num_queries,)``."""
        rises = counterfactual_score(losses_removed, losses_full, reduction="none")
        if len(rises) != len(self.ks):
            raise ValueError(f"Expected `losses_removed` with a row for each of ks={self.ks}, got {len(rises)} rows.")
        self.rises.append(rises.T.flatten().to(self.device, self.dtype))

    def compute(self) -> Tensor:
        """The rise in loss over all queries so far.

        Returns:
            Shape ``(num_ks,)``, or ``(num_ks, num_queries)`` in the order of updates (and ranks). torchmetrics makes
            a scalar of the value of a single k.

        Raises:
            ValueError: If there has been no update.
        """
        rises = self.gathered(self.rises).reshape(-1, len(self.ks)).T
        return rises.mean(1) if self.reduction == "mean" else rises

    @override
    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the rise in loss against k, with a band of one standard error where there is a value per query."""
        figure, axes = new_axes(ax)
        values = self.compute() if val is None else val
        for value in [values] if isinstance(values, Tensor) else values:
            rises = value.detach().cpu().reshape(len(self.ks), -1)
            mean = rises.mean(1)
            (line,) = axes.plot(self.ks, mean.numpy(), marker="o")
            if rises.shape[1] > 1:
                error = rises.std(1) / rises.shape[1] ** 0.5
                low, high = (mean - error).numpy(), (mean + error).numpy()
                axes.fill_between(self.ks, low, high, color=line.get_color(), alpha=0.2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("examples removed (k)")
        axes.set_ylabel("rise in the query's loss")
        return figure, axes
