"""The choice of a damping by agreement with retrained models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.attribute import class_of, create, methods
from stride_lightning.evaluation.evaluate import evaluate
from stride_lightning.gradients.damping import check_damping
from stride_lightning.gradients.presets import InfluenceAttributor
from stride_lightning.retraining.ground_truth import GroundTruth
from stride_lightning.runtime.progress import track

#: The default dampings, relative to the mean eigenvalue of the curvature.
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True, eq=False)
class DampingSearch:
    """The agreement of scores with retraining, by damping.

    Args:
        method: The method, as the label of its attributions names it.
        dampings: All dampings tried, ascending.
        per_query: Linear datamodeling score of each query, shape ``(num_dampings, num_queries)``.
    """

    method: str
    dampings: tuple[float, ...]
    per_query: Tensor

    @property
    def lds(self) -> Tensor:
        """Mean over queries, shape ``(num_dampings,)``."""
        return self.per_query.mean(1)

    @property
    def best(self) -> float:
        """The damping with the highest score."""
        return self.dampings[int(self.lds.argmax())]

    @property
    def lds_on_others(self) -> float:
        """The score on queries that took no part in the choice: the mean over two halves, each by the other's."""
        halves = self.per_query[:, ::2], self.per_query[:, 1::2]
        if halves[1].shape[1] == 0:
            return float("nan")
        judged = [other[int(half.mean(1).argmax())].mean() for half, other in (halves, halves[::-1])]
        return float(torch.stack(judged).mean())

    def __repr__(self) -> str:
        lines = [f"{self.method}: LDS of {self.per_query.shape[1]} queries by damping (x mean eigenvalue)"]
        for damping, lds in zip(self.dampings, self.lds.tolist(), strict=True):
            lines.append(f"{damping:>8g}  {lds:6.3f}{'  best' if damping == self.best else ''}")
        return "\n".join([*lines, f"chosen on half of the queries, measured on the other: {self.lds_on_others:.3f}"])


def tune_damping(
    model: nn.Module,
    queries: Any,
    *,
    train_data: Any,
    truth: GroundTruth,
    method: str = "ekfac",
    dampings: Sequence[float] = DAMPINGS,
    show_progress: bool = True,
    **arguments: Any,
) -> DampingSearch:
    """Try dampings of an influence method against models retrained on random subsets, with a single fit.

    The best damping is chosen and judged on the same truth, so its score is too high; ``lds_on_others`` is the score on
    other queries. For queries without a truth, use the default or the best damping of similar queries.

    Args:
        model: As in :func:`~stride_lightning.attribute`.
        queries: The queries of the truth.
        train_data: The training data of the truth.
        truth: The result of :func:`~stride_lightning.retrain`.
        method: A method with a damping.
        dampings: The dampings to try, relative to the mean eigenvalue of the curvature.
        show_progress: Show progress bars.
        **arguments: ``ckpt_path``, ``weights_only``, ``record``, ``task``, ``loss``, ``measure``, ``train_indices`` and
            ``device`` as in :func:`~stride_lightning.attribute`, and options of the method.

    Returns:
        The scores by damping, and the best.

    Raises:
        ValueError: If the method has no damping, or the truth has other data.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(40, 3, generator=generator)
        >>> data, masks = TensorDataset(x, x.sum(1, keepdim=True)), torch.rand(20, 40, generator=generator) < 0.5
        >>> truth = GroundTruth(masks, torch.rand(1, 20, 40, generator=generator), seeds=[0])
        >>> search = tune_damping(nn.Linear(3, 1), data, train_data=data, truth=truth, show_progress=False)
        >>> search.best in search.dampings
        True
    """
    ascending = tuple(sorted({check_damping(damping) for damping in dampings}))
    if not ascending:
        raise ValueError("`dampings` is empty: give at least one number.")
    names = ("ckpt_path", "weights_only", "record", "task", "loss", "measure", "train_indices", "device")
    fitting = {name: arguments.pop(name) for name in names if name in arguments}
    attributor = create(method, show_progress=show_progress, **arguments)
    if not isinstance(attributor, InfluenceAttributor):
        known = [name for name in methods() if issubclass(class_of(name), InfluenceAttributor)]
        raise ValueError(f"method={method!r} has no damping. Methods that have one: {', '.join(known)}.")
    attributor.fit(model, train_data, **fitting)
    per_query, label = [], method
    for damping in track(ascending, "Dampings", show=show_progress):
        attributor.damping = damping
        attribution = attributor.attribute(queries)
        label = attribution.label
        evaluation = evaluate(attribution, truth, num_resamples=1, show_progress=False)
        per_query.append(evaluation.per_query[label])
    return DampingSearch(label, ascending, torch.stack(per_query))
