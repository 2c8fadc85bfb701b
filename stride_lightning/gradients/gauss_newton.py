"""Inverse Gauss-Newton products without the matrix: conjugate gradients and LiSSA."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from stride_lightning.gradients.curvature import Curvature, TrainingSide
from stride_lightning.gradients.kronecker import EKFAC
from stride_lightning.model.blocks import Block, Gradients
from stride_lightning.model.layers import uncompiled
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.conjugate_gradients import conjugate_gradients
from stride_lightning.runtime.distributed import total
from stride_lightning.runtime.progress import counting, expect, track
from stride_lightning.runtime.randomness import mix

#: Number of steps of a progress bar for iterations of unknown number.
PERCENT = 100
#: Examples of a random batch of LiSSA; the size of forward passes does not change it.
SERIES_BATCH = 256


class GaussNewton(Curvature):
    """The base of both solvers: products with the Gauss-Newton matrix of the mean loss.

    The matrix is ``(1/n) sum_i J_i' l''(o_i) J_i``. ``J_i`` are the derivatives of example i's outputs with respect to
    all parameters, across layers; nothing is approximated. The damping is relative to the mean eigenvalue, which is
    the trace over ``min(n, p)``: with more parameters than examples most eigenvalues are zero.
    """

    is_collective = True

    @override
    def expect(self, train: TrainingSide, num_queries: int) -> None:
        expect("Trace of the Gauss-Newton matrix", train.num_shared, train.curvature_work)

    @override
    def fit(self, train: TrainingSide) -> None:
        self._train = train
        self._sizes = {name: layout.num_parameters for name, layout in train.capture.layouts.items()}
        trace = 0.0
        for batch in train.batches("Trace of the Gauss-Newton matrix"):
            for gradients in batch.curvature(train.seed):
                trace += float(gradients.squared_norms().double().sum())
        summed = float(total(torch.tensor(trace, dtype=torch.float64)))
        self.set_mean_eigenvalue(summed / len(train) / min(len(train), sum(self._sizes.values())))

    def product(self, vectors: Tensor, places: slice | None = None) -> Tensor:
        """The matrix times each row of ``vectors``, shape ``(q, p)``; ``places`` restricts it to some examples."""
        share = self._train.share if places is None else places
        count = len(self._train) if places is None else places.stop - places.start
        tangents = self._by_parameter(vectors)
        summed = {name: torch.zeros_like(tangent) for name, tangent in tangents.items()}
        # Plain autograd, not torch.func, which refuses activation checkpointing.
        with uncompiled(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for linearised in self._train.reader.linearised(share):
                for name, value in self._batch_product(*linearised, tangents).items():
                    summed[name] += value
        joined = torch.cat([layout.join(summed) for layout in self._train.capture.layouts.values()], 1)
        result = (joined if joined.dtype == torch.float64 else joined.float()) / count
        return total(result) if places is None else result

    def _batch_product(
        self, outputs: Tensor, curvature: Callable[[Tensor], Tensor], tangents: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        parameters = self._train.capture.parameters
        unused: dict[str, Any] = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        back = torch.zeros_like(outputs, requires_grad=True)
        # Linear in `back`, so that its own derivative is the product with the tangents: forward mode knows fewer
        # operations, and counts padding rows.
        transposed = torch.autograd.grad(outputs, [*parameters.values()], back, create_graph=True, **unused)
        # Beside the graph of the forward pass stays that of the backward pass, and tangents pass through both.
        step = max(1, self._train.batch_bytes // (2 * len(outputs) * self._train.effort.num_bytes))
        parts = []
        for chunk in zip(*(tangent.split(step) for tangent in tangents.values()), strict=True):
            batched = {"is_grads_batched": True, **unused}
            (changes,) = torch.autograd.grad(transposed, back, chunk, **batched)
            curved = curvature(changes.detach())
            parts.append(torch.autograd.grad(outputs, [*parameters.values()], curved, **batched))
        return dict(zip(parameters, map(torch.cat, zip(*parts, strict=True)), strict=True))

    def _by_parameter(self, vectors: Tensor) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        blocks = vectors.split(list(self._sizes.values()), dim=1)
        for layout, block in zip(self._train.capture.layouts.values(), blocks, strict=True):
            parts |= layout.split(block)
        # In the order of the parameters: tangents must have the layout of the parameters.
        parameters = self._train.capture.parameters
        return {name: parts[name].contiguous().to(parameters[name].dtype) for name in parameters}

    def _gradients(self, vectors: Tensor) -> Gradients:
        blocks = vectors.split(list(self._sizes.values()), dim=1)
        return Gradients({name: Block(block) for name, block in zip(self._sizes, blocks, strict=True)})


class ConjugateGradient(GaussNewton):
    """Damped Gauss-Newton systems by conjugate gradients, preconditioned by EK-FAC.

    Queries are solved together, each scaled to unit norm first, so that all are solved equally well. Iterations end
    when each residual's norm is below ``tolerance`` times its gradient's, or after ``max_iterations`` with a warning.
    """

    def __init__(self, damping: float = 0.0, *, tolerance: float = 1e-3, max_iterations: int = 200) -> None:
        super().__init__(damping)
        if not 0 < tolerance < 1 or max_iterations < 1:
            raise ValueError(
                "Expected a `tolerance` between 0 and 1 and `max_iterations` of at least 1, got "
                f"{tolerance!r} and {max_iterations!r}."
            )
        self.tolerance, self.max_iterations = tolerance, max_iterations

    @override
    def expect(self, train: TrainingSide, num_queries: int) -> None:
        super().expect(train, num_queries)
        EKFAC().expect(train, num_queries)
        # About five products, each with one pass forward and two backward for every query, and as much for EK-FAC.
        work = 5 * num_queries * train.num_shared * 2 * train.loss_work
        expect("Conjugate gradients", PERCENT, work / PERCENT)

    @override
    def fit(self, train: TrainingSide) -> None:
        super().fit(train)
        self._preconditioner = EKFAC()
        self._preconditioner.fit(train)

    @override
    def solve(self, gradients: Gradients) -> Gradients:
        dense = gradients.dense()
        norms = dense.norm(dim=1, keepdim=True).clamp(min=torch.finfo(dense.dtype).tiny)
        damping, steps = self.absolute_damping, itertools.count()

        def product(vectors: Tensor) -> Tensor:
            return self.product(vectors) + damping * vectors

        def precondition(vectors: Tensor) -> Tensor:
            # The logarithm of the residuals falls about evenly, from 1 to the tolerance; the first steps say little.
            reached = math.log(max(float(vectors.norm(dim=1).max()), self.tolerance)) / math.log(self.tolerance)
            done = max(int(PERCENT * reached), min(5 * next(steps), PERCENT // 2))
            bar.update(max(0, done - bar.done))
            return self._preconditioner.solve_damped(self._gradients(vectors), damping).dense()

        with counting(PERCENT, "Conjugate gradients", self._train.reader.show_progress) as bar:
            limits = {"tolerance": self.tolerance, "max_iterations": self.max_iterations}
            solution = conjugate_gradients(product, dense / norms, precondition, **limits)
            bar.update(PERCENT - bar.done)
        self.chosen["iterations"] = max(solution.num_iterations, self.chosen.get("iterations", 0))
        if not solution.is_solved:
            warnings.warn(
                f"Conjugate gradients did not reach a residual of {self.tolerance:g} in {self.max_iterations} "
                "iterations, so some directions are damped more strongly than you chose. Give a larger `damping=`, or "
                "more `max_iterations=`.",
                stacklevel=2,
            )
        return self._gradients(solution.values * norms)


class LiSSA(GaussNewton):
    """Damped Gauss-Newton systems by a Neumann series of ``depth`` terms, over random batches.

    ``v <- g + (I - (H_b + damping I) / s) v`` for one batch b after another ends near ``s (H + damping I)^-1 g``. The
    scale s is above the largest eigenvalue of every batch, which power iteration gives, so the series cannot diverge.
    The result is the mean of the second half of the terms: the last term alone has the noise of the last batches.
    """

    def __init__(self, damping: float = 0.0, *, depth: int = 200) -> None:
        super().__init__(damping)
        self.depth = check_count("depth", depth)

    @override
    def expect(self, train: TrainingSide, num_queries: int) -> None:
        super().expect(train, num_queries)
        size = min(len(train), SERIES_BATCH)
        expect("LiSSA: largest eigenvalues", -(-len(train) // SERIES_BATCH), 20 * size * 2 * train.loss_work)
        expect("LiSSA", self.depth, num_queries * size * 2 * train.loss_work)

    @override
    def fit(self, train: TrainingSide) -> None:
        super().fit(train)
        starts = range(0, len(train), SERIES_BATCH)
        self._batches = [slice(start, min(start + SERIES_BATCH, len(train))) for start in starts]
        every = track(self._batches, "LiSSA: largest eigenvalues", show=train.reader.show_progress)
        largest = max(self._largest_eigenvalue(places) for places in every)
        self._scale = 1.1 * largest  # power iteration comes from below
        self.chosen["scale"] = self._scale

    def _largest_eigenvalue(self, places: slice) -> float:
        like = next(iter(self._train.capture.parameters.values()))
        generator = torch.Generator().manual_seed(self._train.seed)
        vector = torch.randn(1, sum(self._sizes.values()), generator=generator).to(like)
        for _ in range(20):
            vector = self.product(vector / vector.norm(), places)
            if not vector.any():  # the model is certain about all of these examples
                return 0.0
        return float(vector.norm())

    @override
    def solve(self, gradients: Gradients) -> Gradients:
        start = gradients.dense()
        scale, damping = self._scale + self.absolute_damping, self.absolute_damping
        vectors, later = start, torch.zeros_like(start)
        order: list[int] = []
        with counting(self.depth, "LiSSA", self._train.reader.show_progress) as bar:
            for step in range(self.depth):
                epoch, place = divmod(step, len(self._batches))
                if place == 0:
                    generator = torch.Generator().manual_seed(mix(self._train.seed, epoch))
                    order = torch.randperm(len(self._batches), generator=generator).tolist()
                places = self._batches[order[place]]
                vectors = start + vectors - (self.product(vectors, places) + damping * vectors) / scale
                if step >= self.depth // 2:
                    later += vectors / (self.depth - self.depth // 2)
                bar.update(1)
        solution = later / scale
        residuals = (start - self.product(solution) - damping * solution).norm(dim=1)
        largest = float((residuals / start.norm(dim=1).clamp(min=1e-30)).max())
        self.chosen["residual_max"] = max(largest, self.chosen.get("residual_max", 0.0))
        if largest > 0.1:
            warnings.warn(
                f"LiSSA ended with residuals of up to {largest:.0%} of the gradients after {self.depth} terms, so "
                "some directions are damped more strongly than you chose. Give a larger `damping=`, more `depth=`, or "
                "use method='influence-cg'.",
                stacklevel=2,
            )
        return self._gradients(solution)
