"""The methods without a curvature: Grad-Dot, Grad-Cos and TracIn."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.gradients.attributor import GradientAttributor
from stride_lightning.gradients.checkpoints import Checkpoint, recorded_weights, tracin_checkpoints
from stride_lightning.gradients.curvature import Curvature, Identity
from stride_lightning.gradients.reading import AnyBatch
from stride_lightning.gradients.residuals import ResidualsAttributor
from stride_lightning.model.blocks import Gradients
from stride_lightning.model.capture import chosen_parameters
from stride_lightning.storage.lookup import show_fingerprint


class PlainAttributor(GradientAttributor):
    """The base of methods without a curvature: scores are inner products of what :meth:`features` gives."""

    @override
    def curvature(self) -> Curvature:
        return Identity()

    @override
    def scale(self) -> float:
        return 1 / len(self._fitted)


class GradDotAttributor(ResidualsAttributor, PlainAttributor):
    """Grad-Dot: inner products of loss gradients.

    Unit: nats of query loss per unit of learning rate, for one step on the example alone.

    Reference: arXiv:2002.08484 (TracIn), section 3.
    """

    method = "grad-dot"
    unit = "nats of query loss per unit of learning rate"


class GradCosAttributor(PlainAttributor):
    """Grad-Cos: cosines of loss gradients, from -1 to 1, without a unit. An example without a gradient scores 0.

    Reference: Charpiat et al. 2019, Input similarity from the neural network perspective.
    """

    method = "grad-cos"
    unit = "cosines, from -1 to 1"

    @override
    def score_training_data(self, model: nn.Module, device: torch.device) -> Tensor:
        raise ValueError("The cosine of a gradient with itself is always 1. Use another method for self-influence.")

    @override
    def features(self, batch: AnyBatch) -> Gradients:
        gradients = batch.loss()
        norms = gradients.squared_norms().sqrt()
        return gradients.scaled((norms > 0) / norms.clamp(min=1e-30))


class TracInAttributor(PlainAttributor):
    """TracIn: inner products of loss gradients at checkpoints along training, weighted by the learning rates there.

    Each parameter is weighted by the learning rate of its group. With one checkpoint per epoch the unit is nats of
    query loss times the batch size; momentum and the scaling of adaptive optimizers are not part of the method. A
    ``.ckpt`` may hold a learning rate that the scheduler has already changed, which gives a warning; TracInCallback
    records the rate that the last step used.

    Args:
        record: An argument of ``attribute()``: a folder of records of ``TracInCallback``, or of ``.ckpt`` files. By
            default the records that the checkpoint or the attached trainer's callback names.

    Reference: arXiv:2002.08484 (TracInCP), section 3.3.
    """

    method = "tracin"
    unit = "nats of query loss, to first order"

    @override
    def starting_points(self, model: nn.Module, record: Any, checkpoint: Any) -> list[tuple[Checkpoint | None, Any]]:
        if record is not None and self.checkpoints is not None:
            raise ValueError("Both `record` and `checkpoints` name checkpoints of TracIn: give only one of them.")
        source = self.checkpoints if record is None else record
        known = tracin_checkpoints(source, checkpoint, model, self.weights_only)
        if known is None:
            raise ValueError(
                "method='tracin' needs checkpoints along training, but none are known for these weights. Train with "
                "TracInCallback() among the trainer's callbacks, or give `record=`: a folder of its records or of "
                ".ckpt files."
            )
        checkpoints, self._recorded_data, note = known
        self.metadata["record_note"] = note
        if source is None and self.weights not in map(recorded_weights, checkpoints):
            warnings.warn(
                f"TracIn sums over {note}, but none of them has the model's present weights: scores describe that "
                "training, not how these weights arose. Give the records of these weights' training as `record=`.",
                stacklevel=2,
            )
        if scheduled := [one.name for one in checkpoints if one.is_scheduled]:
            warnings.warn(
                f"{', '.join(scheduled[:3])} stores the learning rates beside a scheduler, which may have changed them "
                "after the last step. Train with TracInCallback, which records the rates that steps use.",
                stacklevel=2,
            )
        if without := [one.name for one in checkpoints if one.learning_rates is None]:
            raise ValueError(
                f"TracIn needs learning rates as weights of checkpoints, but {', '.join(without[:3])} holds none. Give "
                "records of TracInCallback or Lightning's .ckpt files, or use method='grad-dot' with `checkpoints=`, "
                "which weights all equally."
            )
        # A parameter without a rate was in no optimizer, so it was not trained.
        names = chosen_parameters(model, self.layers)
        rates = [one.learning_rates or {} for one in checkpoints]
        frozen = set().union(*rates) - names.keys()
        if frozen and self.layers is None:
            warnings.warn(
                "These parameters had a learning rate in training, but they are frozen now and do not count: "
                f"{', '.join(sorted(frozen)[:5])}. Set requires_grad=True on them to include them.",
                stacklevel=2,
            )
        weights = [{name: by_name.get(name, 0.0) for name in names} for by_name in rates]
        return list(zip(checkpoints, weights, strict=True))

    @override
    def check_data(self, fingerprint: dict[str, Any]) -> None:
        if self._recorded_data not in (None, fingerprint):
            raise ValueError(
                "The records of TracInCallback were made with other training data.\n"
                f"  records: {show_fingerprint(self._recorded_data)}\n  given:   {show_fingerprint(fingerprint)}\n"
                "Pass the data (in the same order) that the model was trained on; was random_split given no seed?"
            )

    @override
    def scale(self) -> float:
        return 1.0
