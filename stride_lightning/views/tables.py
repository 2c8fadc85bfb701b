"""An attribution as a pandas table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from stride_lightning.results.scores import AttributionResult
from stride_lightning.results.texts import STD_COLUMN
from stride_lightning.runtime.checks import check_count
from stride_lightning.tasks.measures import OF_LOSS, in_words

if TYPE_CHECKING:
    from pandas import DataFrame


def dataframe(attribution: AttributionResult, k: int | None = None) -> DataFrame:
    """One row per query and training example; see :meth:`Attribution.to_dataframe`."""
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to_dataframe() needs pandas: pip install 'stride-lightning[pandas]'.") from error
    if k is not None:
        check_count("k", k)
    rows, columns, scores, std = attribution.pairs(k)
    table: dict[str, Any] = {"query": rows, "train_index": attribution.train_indices[columns], "score": scores}
    if attribution.measure != OF_LOSS:
        table["measure"] = in_words(attribution.measure)
    if std is not None:
        table[STD_COLUMN] = std
    if attribution.train_targets is not None and attribution.train_targets.ndim == 1:
        table["target"] = attribution.train_targets[columns]
    arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in table.items()}
    frame = pd.DataFrame(arrays, index=range(len(rows)))
    for name, values in attribution.train_info.items():
        frame[name] = [values[i] for i in columns.tolist()]
    for name, values in attribution.query_info.items():
        frame[f"query_{name}"] = [values[i] for i in rows.tolist()]
    return frame
