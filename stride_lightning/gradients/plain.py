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
from stride_lightning.gradients.features import Batch
from stride_lightning.model.blocks import Gradients
from stride_lightning.model.capture import chosen_parameters
from stride_lightning.storage.lookup import show_fingerprint


class GradDotAttributor(GradientAttributor):
    """Grad-Dot: inner products of loss gradients.

    Unit: nats of query loss per unit of learning rate, for one step on the example alone.

    Reference: arXiv:2002.08484 (TracIn), section 3.
    """

    method = "grad-dot"
    unit = "nats of query loss per unit of learning rate"

    @override
    def curvature(self) -> Curvature:
        return Identity()

    @override
    def scale(self) -> float:
        return 1 / len(self._fitted)


class GradCosAttributor(GradDotAttributor):
    """Grad-Cos: cosines of loss gradients, from -1 to 1; without a unit. An example without a gradient scores 0.

    Reference: Charpiat et al. 2019, Input similarity from the neural network perspective.
    """

    method = "grad-cos"
    unit = "cosines, from -1 to 1"

    @override
    def score_training_data(self, model: nn.Module, device: torch.device) -> Tensor:
        raise ValueError("The cosine of every gradient with itself is 1: use the self-influence of another method.")

    @override
    def features(self, batch: Batch) -> Gradients:
        gradients = batch.loss()
        norms = gradients.squared_norms().sqrt()
        return gradients.scaled((norms > 0) / norms.clamp(min=1e-30))


class TracInAttributor(GradDotAttributor):
    """TracIn: inner products of loss gradients at checkpoints along training, weighted by the learning rate then.

    Parameters are weighted by their own learning rates. With one checkpoint per epoch the unit is nats of query loss
    times the batch size; momentum and the scaling of adaptive optimizers are not part of the method. A ``.ckpt`` holds
    the learning rate after its scheduler's last move, which is warned of; TracInCallback records the one used.

    Args:
        record: Given to ``attribute()``: a folder of records of ``TracInCallback``, or of ``.ckpt`` files. By default
            what the checkpoint or the attached trainer's callback names.

    Reference: arXiv:2002.08484 (TracInCP), section 3.3.
    """

    method = "tracin"
    unit = "nats of query loss, to first order"

    @override
    def starting_points(self, model: nn.Module, record: Any, checkpoint: Any) -> list[tuple[Checkpoint | None, Any]]:
        if record is not None and self.checkpoints is not None:
            raise ValueError("`record` and `checkpoints` both name checkpoints of TracIn; give one of them.")
        source = self.checkpoints if record is None else record
        known = tracin_checkpoints(source, checkpoint, model, self.weights_only)
        if known is None:
            raise ValueError(
                "method='tracin' needs checkpoints along training, and none are known for these weights. Train with "
                "TracInCallback() in the trainer's callbacks, or pass `record=`: a folder of its records or of .ckpt "
                "files."
            )
        checkpoints, self._recorded_data, note = known
        self.metadata["record_note"] = note
        if source is None and self.weights not in map(recorded_weights, checkpoints):
            warnings.warn(
                f"{note}, but none of them has the weights of the model as it is now: scores say what that training "
                "did, not how the model came to be as it is.",
                stacklevel=2,
            )
        if scheduled := [one.name for one in checkpoints if one.is_scheduled]:
            warnings.warn(
                f"The learning rates in {', '.join(scheduled[:3])} were stored beside a scheduler, which may have "
                "moved them on after the last step. TracInCallback records the ones that were used.",
                stacklevel=2,
            )
        if without := [one.name for one in checkpoints if one.learning_rates is None]:
            raise ValueError(
                f"{', '.join(without[:3])} hold no learning rates, which TracIn weighs checkpoints by. Use records of "
                "TracInCallback or Lightning's .ckpt files; method='grad-dot' with `checkpoints=` weighs all equally."
            )
        # What no optimizer held was not trained.
        names = chosen_parameters(model, self.layers)
        rates = [one.learning_rates or {} for one in checkpoints]
        frozen = set().union(*rates) - names.keys()
        if frozen and self.layers is None:
            warnings.warn(
                f"{', '.join(sorted(frozen)[:5])} had a learning rate in training and are frozen now, so they do not "
                "count. Set requires_grad=True if they should.",
                stacklevel=2,
            )
        weights = [{name: of_one.get(name, 0.0) for name in names} for of_one in rates]
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
