"""STRIDE for sequences: one pass for what all tokens say, one to score; nothing grows with their number."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.data.reading import required, survey
from stride_lightning.runtime.distributed import gather, shard
from stride_lightning.runtime.progress import counting
from stride_lightning.steering.activations import choose_layers
from stride_lightning.steering.language.activation_cache import ActivationCache
from stride_lightning.steering.language.curvature import FEATURE_DAMPING, TokenCurvature, TokenMoments
from stride_lightning.steering.language.operators import TokenOperators, fit_token_operators, measure_tokens
from stride_lightning.steering.language.output_space import choose_output_space
from stride_lightning.steering.language.tokens import BATCH_BYTES, TokenBatch, TokenReader
from stride_lightning.steering.published.hidden_states import HiddenStateOperators
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.language import CausalLanguageModeling

#: Layers whose inputs are features, evenly spaced from first to last.
MAX_TOKEN_LAYERS = 5
#: Bytes that queries, or operators, may take; more queries need more passes over the training data.
HELD_BYTES = 2**30
#: Most numbers in one operator; beyond, features are cut to their leading principal directions.
MAX_VALUES = 2**22


@dataclass(frozen=True)
class Asked:
    """Queries as the scoring pass needs them, q of them.

    Args:
        solved: Shape ``(q, r, c)``.
        measurements: Effects of the operators, shape ``(q, K)``; empty without operators.
        losses: Shape ``(q,)``.
    """

    solved: Tensor
    measurements: Tensor
    losses: Tensor


@dataclass(frozen=True)
class SequenceCost:
    """What a fit to sequences is expected to take: seconds, bytes of memory beyond the model, bytes on disk."""

    seconds: float
    memory_bytes: int
    disk_bytes: int

    @property
    def is_long(self) -> bool:
        """Whether someone will wait."""
        return self.seconds > 2 or self.disk_bytes > 2**30

    def __str__(self) -> str:
        disk = f", {self.disk_bytes / 2**20:.0f} MiB of activations on disk" if self.disk_bytes else ""
        return (
            f"about {self.seconds:.0f} s to fit, as long for every pass that scores, "
            f"{self.memory_bytes / 2**20:.0f} MiB of memory whatever the number of sequences{disk}"
        )


class SequenceStride:
    r"""Steering operators of a language model, and the influence they give in closed form.

    Features ``phi`` are the inputs of a few layers at every token, ``e`` the gradient of the token's loss in the
    steered space. With ``G_i = sum_t w_t phi_t e_t'`` for sequence ``i``, the score is the first-order influence of the
    convex problem that all operators share,

    .. math:: w_{qi} = \frac{1}{W} \langle G_q, A^{-1} G_i B^{-1} \rangle, \quad
              A = \frac{1}{W} \sum w \phi \phi', \; B = \frac{1}{W} \sum w e e',

    sums over all training tokens and ``W`` the sum of their weights. The factors of the curvature are an approximation,
    as is cutting features to their leading directions where ``r c > 2^22``; everything else is exact. The network runs
    forward only.

    Memory: ``24 (r^2 + c^2)`` bytes for the moments (``c`` in place of ``c^2`` beyond 1024), ``4 q r c`` for the
    queries (at most 1 GiB: more take more passes), ``4 K r c`` for operators (cut to 1 GiB), and one batch (256 MiB of
    logits at most, or one sequence). Nothing grows with the number of training sequences but the scores.

    Args:
        task: The losses.
        layers: Modules whose inputs are features; five by default.
        damping: Of ``A`` relative to its mean eigenvalue.
        batch_size: Sequences per forward pass at most.
        cache_dir: Folder for activations, so that later passes do not run the model.
        seed: Of a learned basis.
        show_progress: Show progress bars.

    Reference: arXiv:2606.05165 (STRIDE), steering operators in hidden-state space; the closed form is ours.
    """

    def __init__(
        self,
        task: CausalLanguageModeling,
        *,
        layers: Sequence[str] | None = None,
        damping: float = FEATURE_DAMPING,
        batch_size: int = 256,
        cache_dir: str | Path | None = None,
        seed: int = 0,
        show_progress: bool = True,
    ) -> None:
        self.seed = seed
        self.task, self.layers, self.damping = task, layers, damping
        self.batch_size, self.show_progress = batch_size, show_progress
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.design: Design | None = None
        self.operators: TokenOperators | None = None
        self.hidden: HiddenStateOperators | None = None
        #: What was chosen, and what it cost; plain values.
        self.info: dict[str, Any] = {}

    # ---- fit ------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, train: Examples, device: torch.device, identity: dict[str, Any]) -> None:
        """Look at the model and a first batch: layers, where to steer, and what identifies the data.

        Args:
            model: In eval mode, on ``device``.
            train: The training sequences.
            device: Where to run.
            identity: Plain values that tell the model from others, for the cache.
        """
        head = first_batch(train, min(self.batch_size, 4), device)
        with train.naming(0):
            self.task.check_batch(model, head)
        inputs = self.task.inputs(head)
        space = choose_output_space(model, lambda: self.task.outputs(model, inputs))
        if self.layers is None:
            self.layers = choose_token_layers(model, self.task, inputs)
        texts = survey(train, self.task, model, space.vocabulary, description="Reading" if self.show_progress else "")
        self.fingerprint, self.space = texts.fingerprint, replace(space, longest=texts.longest)
        self._device, self._train, self._share = device, train, shard(len(train))
        self._reader = TokenReader(
            model,
            self.task,
            self.layers,
            self.space,
            batch_size=self.batch_size,
            device=device,
            show_progress=self.show_progress,
        )
        probed = range(min(len(train), self._reader.rows_per_batch, 8))
        started = time.perf_counter()
        probe = next(iter(self._reader.batches(train, "", share=slice(0, len(probed)))))
        self._seconds_per_sequence = (time.perf_counter() - started) / len(probed)
        self._widths, self._num_features = (*self._reader.widths, 1), probe.features.shape[-1]
        self._dtype = probe.features.dtype
        self._kept_widths = {name: values.shape[-1] for name, values in self._reader.kept(probe).items()}
        self._open_cache(identity, required(texts.num_tokens)[self._share])

    def estimate(self) -> SequenceCost:
        """What a fit will take, from the pass over a first batch."""
        num_subsets = 0 if self.design is None else self.design.num_subsets
        features, width = self._num_features, self.space.width
        values = min(features * width, MAX_VALUES)
        share = self._share.stop - self._share.start
        moments = features**2 + (width if self.space.is_diagonal else width**2)
        return SequenceCost(
            seconds=self._seconds_per_sequence * share * (2 if num_subsets else 1),
            memory_bytes=24 * moments + 4 * num_subsets * values + BATCH_BYTES,
            disk_bytes=0 if self._cache is None else self._cache.num_bytes,
        )

    def fit(self) -> None:
        """Run over the training sequences once and keep their moments and losses."""
        started = time.perf_counter()
        moments = TokenMoments.zeros(self._num_features, self.space, self._device)
        losses = torch.empty(self._share.stop - self._share.start, dtype=self._dtype)
        for batch in self._passes("Statistics"):
            moments.update(batch)
            losses[batch.places.start - self._share.start : batch.places.stop - self._share.start] = batch.losses.cpu()
        self.moments, self.losses = moments.total(), gather(losses, len(self._train))
        self._curve()
        self.info["seconds"] = {"statistics": time.perf_counter() - started}

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors to store; with :meth:`prepare`, all that :meth:`fit` finds out."""
        return {**self.moments.tensors(), "losses": self.losses}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take from a record what :meth:`fit` finds out."""
        parts = (tensors[name].to(self._device) for name in ("features", "downhill", "sums"))
        self.moments, self.losses = TokenMoments(*parts), tensors["losses"]
        self._curve()
        self.info["seconds"] = {"statistics": 0.0}

    def _curve(self) -> None:
        count = 1 if self.design is None else self.design.num_subsets
        self.curvature = TokenCurvature(
            self.moments,
            self._widths,
            damping=self.damping,
            max_values=max(1024, min(MAX_VALUES, HELD_BYTES // (4 * count))),
            dtype=self._dtype,
            device=self._device,
        )
        self._reader.num_values = math.prod(self.curvature.shape)
        self.info |= {
            "steered": self.space.kind,
            "num_features": self._num_features,
            "operator_shape": list(self.curvature.shape),
            "kept_energy": list(self.curvature.kept_energy),
            "num_tokens": int(self.moments.sums[2]),
            "mean_train_loss": self.moments.mean_loss,
        }

    def fit_operators(self, design: Design, *, steps: int = 1, stored: Tensor | None = None) -> None:
        """Fit the operators of a design, or take those that are stored; see :func:`fit_token_operators`."""
        started = time.perf_counter()
        if design is not self.design:
            self.design = design
            self._curve()
        if stored is None or not self.curvature.is_whole:
            self.operators = fit_token_operators(self._passes, design, self.curvature, self.space, steps=steps)
        else:
            self.operators = TokenOperators(stored.to(self._device), torch.full((len(stored),), torch.nan))
        self.info["seconds"]["operators"] = time.perf_counter() - started

    def learn_operators(
        self, model: nn.Module, design: Design, *, rank: int, layer: str | None, stability: float
    ) -> None:
        """Fit operators on a hidden state inside the network, as published; see :class:`HiddenStateOperators`."""
        started = time.perf_counter()
        self.design = design
        self.hidden = HiddenStateOperators(
            model, self.task, design, layer=layer, rank=rank, stability=stability, seed=self.seed
        )
        self.hidden.fit_operators(self._train, self._device, show_progress=self.show_progress)
        self.info |= {"steered": self.hidden.layer, "rank": rank, "steps": self.hidden.max_steps}
        self.info["seconds"]["operators"] = time.perf_counter() - started

    # ---- ask ------------------------------------------------------------------------------------------------

    def ask(self, queries: Examples) -> Asked:
        """Run over the queries: their side of the scores, and what the operators do to them; ranks share them."""
        share, count = shard(len(queries)), 0 if self.design is None else self.design.num_subsets
        mine = share.stop - share.start
        solved, losses = self.curvature.zeros(mine), torch.zeros(mine, dtype=self._dtype, device=self._device)
        measured = torch.zeros(mine, count, dtype=self._dtype, device=self._device)
        with_logits = self.operators is not None
        for batch in self._reader.batches(queries, "Queries", share=share, with_logits=with_logits):
            rows = slice(batch.places.start - share.start, batch.places.stop - share.start)
            solved[rows] = self.curvature.solve(self.curvature.gradients(batch))
            losses[rows] = batch.losses
            if self.operators is not None:
                measured[rows] = measure_tokens(batch, self.operators.coefficients, self.curvature, self.space)
        if self.hidden is not None and mine:
            part = queries.subset(range(share.start, share.stop))
            measured = self.hidden.measure(part, self._device, show_progress=self.show_progress).to(measured)
        return Asked(*(gather(part, len(queries)) for part in (solved, measured, losses)))

    def queries_per_pass(self) -> int:
        """Queries that one pass over the training data can score."""
        rows, columns = self.curvature.shape
        return max(1, HELD_BYTES // (4 * rows * columns))

    def influence(self, asked: Asked) -> Tensor:
        """Scores of every training sequence for the queries, on the CPU, shape ``(q, n)``; ranks share the work."""
        scores = torch.empty(len(asked.solved), self._share.stop - self._share.start, dtype=self._dtype)
        for batch in self._passes("Scores"):
            columns = slice(batch.places.start - self._share.start, batch.places.stop - self._share.start)
            scores[:, columns] = self.curvature.influence(asked.solved, self.curvature.gradients(batch)).cpu()
        return gather(scores, len(self._train), dim=1)

    # ---- reading --------------------------------------------------------------------------------------------

    def _passes(self, description: str, with_logits: bool = False) -> Iterator[TokenBatch]:
        """This rank's sequences: from the cache as far as it goes, then through the model."""
        start, stop = self._share.start, self._share.stop
        if self._cache is None or with_logits:
            yield from self._reader.batches(self._train, description, share=slice(start, stop), with_logits=with_logits)
            return
        with counting(self._cache.done, description, show=self.show_progress) as bar:
            for part, saved, losses in self._cache.batches():
                yield self._reader.restored(slice(part.start + start, part.stop + start), saved, losses)
                bar.update(part.stop - part.start)
        for batch in self._reader.batches(self._train, description, share=slice(start + self._cache.done, stop)):
            part = slice(batch.places.start - start, batch.places.stop - start)
            self._cache.write(part, self._reader.kept(batch), batch.losses)
            yield batch

    def _open_cache(self, identity: dict[str, Any], lengths: Tensor) -> None:
        self._cache: ActivationCache | None = None
        if self.cache_dir is None:
            return
        folder = self.cache_dir / f"sequences-{self._share.start}-{self._share.stop}"
        known = identity | {
            "data": self.fingerprint,
            "layers": list(self.layers or []),
            "steered": self.space.kind,
            "task": repr(self.task),
        }
        self._cache = ActivationCache(folder, known, lengths, self._kept_widths)
        self.info["cache_bytes"] = self._cache.num_bytes


def choose_token_layers(model: nn.Module, task: CausalLanguageModeling, inputs: dict[str, Any]) -> list[str]:
    """Layers whose inputs are features by default: five with a weight matrix, evenly spaced from first to last."""
    size, num_tokens = inputs["input_ids"].shape
    forward = partial(task.outputs, model, inputs)
    return choose_layers(model, forward, size, MAX_TOKEN_LAYERS, num_tokens=num_tokens)
