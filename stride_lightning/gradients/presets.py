"""The methods with a curvature, by name: each a choice of features, curvature and projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from stride_lightning.gradients.curvature import Curvature, DataInf, Diagonal, Fisher, GaussNewtonBlocks
from stride_lightning.gradients.damping import check_damping
from stride_lightning.gradients.gauss_newton import ConjugateGradient, LiSSA
from stride_lightning.gradients.kronecker import EKFAC
from stride_lightning.gradients.projection import JointProjection, LayerProjection, Projection
from stride_lightning.gradients.reading import AnyBatch
from stride_lightning.gradients.residuals import ResidualsAttributor
from stride_lightning.model.blocks import Gradients
from stride_lightning.model.capture import Capture, Outputs
from stride_lightning.model.plan import last_layer
from stride_lightning.runtime.checks import check_count

#: Up to so many parameters, the curvature of a last layer is computed and factorised as a whole.
MAX_FACTORISED = 4096


class InfluenceAttributor(ResidualsAttributor):
    r"""The base of influence functions: a damped curvature, ``g_q' (H + \lambda I)^{-1} g_i / n``.

    Unit: nats of query loss, to first order, for taking the example out of the training set. Damping and an approximate
    curvature shrink or stretch the scores, so read them as a ranking rather than a prediction.

    Args:
        damping: Relative to the mean eigenvalue of the curvature.
        kwargs: Arguments of :class:`~stride_lightning.gradients.residuals.ResidualsAttributor`.
    """

    default_damping: ClassVar[float]
    curvature_class: ClassVar[type[Curvature]]

    def __init__(self, *, damping: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._damping = self.default_damping if damping is None else check_damping(damping)

    @property
    def damping(self) -> float:
        """Relative to the mean eigenvalue. It can be set after a fit; no new fit is needed."""
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

    @override
    def curvature(self) -> Curvature:
        return self.curvature_class(self._damping)


class DiagonalAttributor(InfluenceAttributor):
    """Influence with the diagonal of the empirical Fisher matrix; one damping for all parameters."""

    method, default_damping, curvature_class = "diagonal", 0.1, Diagonal


class DataInfAttributor(InfluenceAttributor):
    """DataInf: block by block, the mean of the inverses over training examples, in place of the inverse of the mean.

    Every chunk of queries takes one more pass over the training set.

    Reference: arXiv:2310.00902.
    """

    method, default_damping, curvature_class = "datainf", 0.1, DataInf


class EKFACAttributor(InfluenceAttributor):
    """Influence with EK-FAC: the Gauss-Newton matrix of each layer in the eigenbasis of its Kronecker factors.

    Reference: arXiv:1806.03884; arXiv:2308.03296, section 2.2.
    """

    method, default_damping, curvature_class = "ekfac", 1.0, EKFAC


class ConjugateGradientAttributor(InfluenceAttributor):
    """Influence with the whole Gauss-Newton matrix of the training loss, by conjugate gradients.

    Args:
        tolerance: Largest relative residual.
        max_iterations: Largest number of products with the matrix.
        kwargs: Arguments of :class:`InfluenceAttributor`.

    Reference: arXiv:1703.04730, section 3.
    """

    method, default_damping = "influence-cg", 3.0
    copies, graphs = 8, 2

    def __init__(self, *, tolerance: float = 1e-3, max_iterations: int = 200, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance, self.max_iterations = tolerance, max_iterations
        ConjugateGradientAttributor.curvature(self)  # refuses wrong options before any work

    @override
    def curvature(self) -> Curvature:
        return ConjugateGradient(self.damping, tolerance=self.tolerance, max_iterations=self.max_iterations)


class LiSSAAttributor(InfluenceAttributor):
    """Influence with the whole Gauss-Newton matrix, by a Neumann series over random batches.

    Args:
        depth: Terms of the series, one batch each.
        kwargs: Arguments of :class:`InfluenceAttributor`.

    Reference: arXiv:1602.03943; arXiv:1703.04730, section 3.
    """

    method, default_damping = "influence-lissa", 3.0
    copies, graphs = 8, 2

    def __init__(self, *, depth: int = 200, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = check_count("depth", depth)

    @override
    def curvature(self) -> Curvature:
        return LiSSA(self.damping, depth=self.depth)


class LastLayerAttributor(ConjugateGradientAttributor):
    """Influence in the last layer alone, with its whole Gauss-Newton matrix; exact if all other layers are frozen.

    Up to 4096 parameters the matrix is factorised; beyond, conjugate gradients solve the systems.
    """

    method, default_damping = "last-layer", 1.0

    @override
    def chosen_layers(self, outputs: Outputs, inputs: Any) -> Sequence[str] | None:
        return [last_layer(outputs, inputs)] if self.layers is None else self.layers

    @override
    def curvature(self) -> Curvature:
        is_small = len(self.capture.layouts) == 1 and self.capture.num_parameters <= MAX_FACTORISED
        return GaussNewtonBlocks(self.damping) if is_small else super().curvature()


class LoGraAttributor(InfluenceAttributor):
    """LoGra: gradients of each layer projected from both sides, with the Gauss-Newton matrix of the projections.

    The matrix is the mean over the labels that the model expects; the paper takes the labels of the training set.

    Args:
        projection_dim: Rows and columns of each layer's projected gradient; narrower sides are not projected.
        kwargs: Arguments of :class:`InfluenceAttributor`.

    Reference: arXiv:2405.13954, section 3.
    """

    method, default_damping, curvature_class = "logra", 1.0, GaussNewtonBlocks

    def __init__(self, *, projection_dim: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.projection_dim = check_count("projection_dim", projection_dim)

    @override
    def projection(self, capture: Capture) -> Projection:
        return LayerProjection(self.projection_dim, self.seed)


class TRAKAttributor(InfluenceAttributor):
    r"""TRAK: a linear model of the margin in projected gradients.

    .. math:: \phi_q' (\Phi'\Phi + \lambda I)^{-1} \phi_i (1 - p_i)

    Unit: log-odds of the query's target, for taking the example out of the training set. With several ``checkpoints``,
    the factors with the kernels and the factors ``1 - p`` are averaged separately. For a task without a margin, the
    outputs towards the target take its place, and the size of the residual takes that of ``1 - p``.

    Args:
        projection_dim: Number of features of an example.
        kwargs: Arguments of :class:`InfluenceAttributor`; the damping is relative to the kernel's mean eigenvalue.

    Reference: arXiv:2303.14186.
    """

    method, default_damping, curvature_class = "trak", 3.0, Fisher
    unit = "log-odds of the query's target, to first order"

    def __init__(self, *, projection_dim: int = 4096, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.projection_dim = check_count("projection_dim", projection_dim)

    @override
    def projection(self, capture: Capture) -> Projection:
        return JointProjection(self.projection_dim, self.seed, capture.num_parameters)

    @override
    def features(self, batch: AnyBatch) -> Gradients:
        return batch.margin()

    @override
    def example_weights(self, batch: AnyBatch) -> Tensor:
        return batch.margin_weights


class TRAKNewtonAttributor(TRAKAttributor):
    r"""TRAK with the weights of its derivation, one step of Newton's method for a logistic regression.

    .. math:: \phi_q' (\Phi' R \Phi + \lambda I)^{-1} \phi_i (1 - p_i), \qquad R = \mathrm{diag}(p_i (1 - p_i))

    Published TRAK leaves R out. With R, an example that the model is certain about does not count in the kernel.

    Reference: arXiv:2303.14186.
    """

    method = "trak-newton"

    @override
    def kernel_weights(self, batch: AnyBatch) -> Tensor:
        return batch.margin_curvature
