"""The methods by name: each a choice of features, curvature and checkpoints."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.gradients.attributor import GradientAttributor
from stride_lightning.gradients.checkpoints import Checkpoint, recorded_weights, tracin_checkpoints
from stride_lightning.gradients.curvature import Curvature, DataInf, Diagonal, Fisher, GaussNewtonBlocks, Identity
from stride_lightning.gradients.damping import check_damping
from stride_lightning.gradients.features import Batch
from stride_lightning.gradients.gauss_newton import ConjugateGradient, LiSSA
from stride_lightning.gradients.kronecker import EKFAC
from stride_lightning.gradients.outputs import TaskOutputs
from stride_lightning.gradients.projection import JointProjection, LayerProjection, Projection
from stride_lightning.model.blocks import Gradients
from stride_lightning.model.capture import Capture, chosen_parameters
from stride_lightning.model.plan import last_layer
from stride_lightning.runtime.checks import check_count
from stride_lightning.storage.lookup import show_fingerprint

#: Parameters of a last layer whose curvature is made and factorised.
MAX_FACTORISED = 4096


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

    Parameters with learning rates of their own are weighted by theirs. With one checkpoint per epoch the unit is nats
    of query loss times the batch size; momentum and the scaling of adaptive optimizers are not part of the method. A
    ``.ckpt`` holds the learning rate after its scheduler's last move, which is warned of; TracInCallback records the
    one that was used.

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
        found = tracin_checkpoints(record if record is not None else self.checkpoints, checkpoint, model)
        if found is None or not found[0]:
            raise ValueError(
                "method='tracin' needs checkpoints along training, and none are known for these weights. Train with "
                "TracInCallback() in the trainer's callbacks, or pass `record=`: a folder of its records or of .ckpt "
                "files."
            )
        checkpoints, self._recorded_data, _, note = found
        self.metadata["record_note"] = note
        if record is None and self.checkpoints is None and self.weights not in map(recorded_weights, checkpoints):
            warnings.warn(
                f"{note}, but none of them has the weights of the model as it is now: scores say what that training "
                "did, not how the model came to be as it is.",
                stacklevel=2,
            )
        scheduled = [one.name for one in checkpoints if one.is_scheduled]
        if scheduled:
            warnings.warn(
                f"The learning rates in {', '.join(scheduled[:3])} were stored beside a scheduler, which may have "
                "moved them on after the last step. TracInCallback records the ones that were used.",
                stacklevel=2,
            )
        without = [one.name for one in checkpoints if one.learning_rates is None]
        if without:
            raise ValueError(
                f"{', '.join(without[:3])} hold no learning rates, which TracIn weighs checkpoints by. Use records of "
                "TracInCallback or Lightning's .ckpt files; method='grad-dot' with `checkpoints=` weighs all equally."
            )
        # What no optimizer held was not trained.
        names = chosen_parameters(model, self.layers)
        frozen = {name for one in checkpoints for name in one.learning_rates or {}} - names.keys()
        if frozen and self.layers is None:
            warnings.warn(
                f"{', '.join(sorted(frozen)[:5])} had a learning rate in training and are frozen now, so they do not "
                "count. Set requires_grad=True if they should.",
                stacklevel=2,
            )
        return [(one, {name: (one.learning_rates or {}).get(name, 0.0) for name in names}) for one in checkpoints]

    @override
    def check_data(self, fingerprint: dict[str, Any]) -> None:
        if self._recorded_data is not None and self._recorded_data != fingerprint:
            raise ValueError(
                "The records of TracInCallback were made with other training data.\n"
                f"  records: {show_fingerprint(self._recorded_data)}\n  given:   {show_fingerprint(fingerprint)}\n"
                "Pass the data (in the same order) that the model was trained on."
            )

    @override
    def scale(self) -> float:
        return 1.0


class InfluenceAttributor(GradientAttributor):
    r"""What influence functions share: a damped curvature, ``g_q' (H + \lambda I)^{-1} g_i / n``.

    Unit: nats of query loss, to first order, for taking the example out of the training set; damping, and what the
    curvature leaves out, shrink or stretch it, so that it is a ranking rather than a prediction.

    Args:
        damping: Relative to the mean eigenvalue of the curvature.
        kwargs: Arguments of :class:`GradientAttributor`.
    """

    #: Damping where none is given.
    default_damping: ClassVar[float]

    def __init__(self, *, damping: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._damping = self.default_damping if damping is None else check_damping(damping)

    @property
    def damping(self) -> float:
        """Relative to the mean eigenvalue; another can be set after a fit, which need not be done again."""
        return self._damping

    @damping.setter
    def damping(self, damping: float) -> None:
        self._damping = check_damping(damping)
        for fitted in self._fitted:
            fitted.curvature.damping = self._damping
        if "options" in self.metadata:
            self.metadata["options"]["damping"] = self._damping

    @override
    def options(self) -> dict[str, Any]:
        return {**super().options(), "damping": self._damping}

    @abstractmethod
    def _undamped(self) -> Curvature:
        """The curvature; its damping is set afterwards."""

    @override
    def curvature(self) -> Curvature:
        curvature = self._undamped()
        curvature.damping = self._damping
        return curvature


class DiagonalAttributor(InfluenceAttributor):
    """Influence with the diagonal of the empirical Fisher matrix; one damping for all parameters."""

    method, default_damping = "diagonal", 0.1

    @override
    def _undamped(self) -> Curvature:
        return Diagonal()


class DataInfAttributor(InfluenceAttributor):
    """DataInf: the mean over training examples of inverses, in place of the inverse of the mean, block by block.

    Every chunk of queries takes one more pass over the training set.

    Reference: arXiv:2310.00902.
    """

    method, default_damping = "datainf", 0.1

    @override
    def _undamped(self) -> Curvature:
        return DataInf()


class EKFACAttributor(InfluenceAttributor):
    """Influence with EK-FAC: the Gauss-Newton matrix of each layer in the eigenbasis of its Kronecker factors.

    Reference: arXiv:1806.03884; arXiv:2308.03296.
    """

    method, default_damping = "ekfac", 1.0

    @override
    def _undamped(self) -> Curvature:
        return EKFAC()


class ConjugateGradientAttributor(InfluenceAttributor):
    """Influence with the whole Gauss-Newton matrix of the training loss, by conjugate gradients.

    Args:
        damping: Relative to the mean eigenvalue.
        tolerance: Largest relative residual.
        max_iterations: Products with the matrix at most.
        kwargs: Arguments of :class:`GradientAttributor`.

    Reference: arXiv:1703.04730, section 3.
    """

    method, default_damping, copies = "influence-cg", 3.0, 8

    def __init__(self, *, tolerance: float = 1e-3, max_iterations: int = 200, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance, self.max_iterations = tolerance, max_iterations
        ConjugateGradient(tolerance=tolerance, max_iterations=max_iterations)  # refuses what cannot be, before any work

    @override
    def _undamped(self) -> Curvature:
        return ConjugateGradient(tolerance=self.tolerance, max_iterations=self.max_iterations)


class LiSSAAttributor(InfluenceAttributor):
    """Influence with the whole Gauss-Newton matrix, by a Neumann series over random batches.

    Args:
        damping: Relative to the mean eigenvalue.
        depth: Terms of the series, one batch each.
        kwargs: Arguments of :class:`GradientAttributor`.

    Reference: arXiv:1602.03943; arXiv:1703.04730, section 3.
    """

    method, default_damping, copies = "influence-lissa", 3.0, 8

    def __init__(self, *, depth: int = 200, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth
        self._undamped()

    @override
    def _undamped(self) -> Curvature:
        return LiSSA(depth=self.depth)


class LastLayerAttributor(ConjugateGradientAttributor):
    """Influence in the last layer alone, with its whole Gauss-Newton matrix: exact for a model frozen before it.

    Up to 4096 parameters the matrix is factorised; beyond, systems are solved by conjugate gradients.
    """

    method, default_damping = "last-layer", 1.0

    @override
    def chosen_layers(self, model: nn.Module, inputs: Any) -> Sequence[str] | None:
        return [last_layer(TaskOutputs(model, self.task), inputs)] if self.layers is None else self.layers

    @override
    def _undamped(self) -> Curvature:
        is_small = len(self.capture.layouts) == 1 and self.capture.num_parameters <= MAX_FACTORISED
        return GaussNewtonBlocks() if is_small else super()._undamped()


class LoGraAttributor(InfluenceAttributor):
    """LoGra: gradients of each layer projected from both sides, with the Gauss-Newton matrix of what is left.

    The matrix is the mean over the labels that the model expects, where the paper takes those of the training set.

    Args:
        damping: Relative to the mean eigenvalue.
        projection_dim: Rows and columns that are left of each layer's gradient; narrower sides are kept.
        kwargs: Arguments of :class:`GradientAttributor`.

    Reference: arXiv:2405.13954.
    """

    method, default_damping = "logra", 1.0

    def __init__(self, *, projection_dim: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("projection_dim", projection_dim)
        self.projection_dim = projection_dim

    @override
    def projection(self, capture: Capture) -> Projection:
        return LayerProjection(self.projection_dim, self.seed)

    @override
    def _undamped(self) -> Curvature:
        return GaussNewtonBlocks()


class TRAKAttributor(InfluenceAttributor):
    r"""TRAK: a linear model of the margin in projected gradients.

    .. math:: \phi_q' (\Phi'\Phi + \lambda I)^{-1} \phi_i (1 - p_i)

    Unit: log-odds of the query's target, for taking the example out of the training set. With ``checkpoints`` of
    several models, kernels and probabilities are averaged by themselves. A task without a margin has its outputs
    towards the target in place of it, and the size of the residual in place of ``1 - p``.

    Args:
        damping: Relative to the mean eigenvalue of the kernel.
        projection_dim: Number of features of an example.
        kwargs: Arguments of :class:`GradientAttributor`.

    Reference: arXiv:2303.14186.
    """

    method, default_damping = "trak", 3.0
    unit = "log-odds of the query's target, to first order"

    def __init__(self, *, projection_dim: int = 4096, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("projection_dim", projection_dim)
        self.projection_dim = projection_dim

    @override
    def projection(self, capture: Capture) -> Projection:
        return JointProjection(self.projection_dim, self.seed, capture.num_parameters)

    @override
    def features(self, batch: Batch) -> Gradients:
        return batch.margin()

    @override
    def example_weights(self, batch: Batch) -> Tensor:
        return batch.margin_weights

    @override
    def _undamped(self) -> Curvature:
        return Fisher()


class TRAKNewtonAttributor(TRAKAttributor):
    r"""TRAK with the weights of its derivation, one step of Newton's method for a logistic regression.

    .. math:: \phi_q' (\Phi' R \Phi + \lambda I)^{-1} \phi_i (1 - p_i), \qquad R = \mathrm{diag}(p_i (1 - p_i))

    Published TRAK leaves R out. With it, an example that the model is sure of does not count in the kernel.

    Args:
        kwargs: Arguments of :class:`TRAKAttributor`.

    Reference: arXiv:2303.14186.
    """

    method = "trak-newton"

    @override
    def kernel_weights(self, batch: Batch) -> Tensor:
        return batch.margin_curvature
