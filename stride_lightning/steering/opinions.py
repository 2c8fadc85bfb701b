"""Whose answer scores explain: the network's and the readout's loss and prediction for each query."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stride_lightning.readout.features import Observation
from stride_lightning.readout.readout import Points, Readout
from stride_lightning.tasks.likelihoods import Task


def compare_predictions(task: Task, readout: Readout, observed: Observation, points: Points) -> dict[str, list[Any]]:
    """Loss and prediction of network and readout for each query, and whether they agree, as columns of ``query_info``.

    They agree on a query if they predict the same; in a regression, if the difference is at most a standard deviation
    of the noise.
    """
    outputs = readout.outputs(points.features)
    noise = readout.problem.noise
    if noise is None:
        predictions = task.predict(observed.outputs), task.predict(outputs)
        agree = (predictions[0] == predictions[1]).reshape(len(outputs), -1).all(1)
    else:
        predictions = observed.outputs, outputs
        rounding = 1e-5 * observed.outputs.abs()  # where targets are constant there is no noise
        agree = ((observed.outputs - outputs).abs() <= noise.sqrt() + rounding).all(1)
    return {
        "loss": observed.losses.tolist(),
        "readout loss": readout.losses(points).tolist(),
        "prediction": _listed(predictions[0]),
        "readout prediction": _listed(predictions[1]),
        "readout agrees": agree.tolist(),
    }


def _listed(predictions: Tensor) -> list[Any]:
    """One plain value for each query; a list where it has several outputs."""
    single = predictions[:, 0] if predictions.ndim == 2 and predictions.shape[1] == 1 else predictions
    return single.tolist()
