"""STRIDE for sequences: one pass sums up all tokens, one scores; nothing grows with the number of sequences."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.data.reading import fingerprint_of, required, survey
from stride_lightning.readout.features import choose_layers
from stride_lightning.runtime.distributed import gather, shard, total
from stride_lightning.runtime.progress import announce, expect
from stride_lightning.steering.fit import Answers, FitOptions, FitRecord
from stride_lightning.steering.language.curvature import TokenCurvature, TokenMoments
from stride_lightning.steering.language.operators import TokenOperators, fit_token_operators, measure_tokens
from stride_lightning.steering.language.output_space import choose_output_space
from stride_lightning.steering.language.passes import TrainingPasses
from stride_lightning.steering.language.tokens import TokenReader
from stride_lightning.steering.published.hidden_states import HiddenStateOperators
from stride_lightning.steering.recovery import check_measurements
from stride_lightning.steering.subsets import Design
from stride_lightning.storage.records import Record
from stride_lightning.tasks.language import CausalLanguageModeling

#: Layers whose inputs are features, evenly spaced from first to last.
MAX_TOKEN_LAYERS = 5
#: Bytes that queries, or operators, may take; more queries need more passes over the training data.
HELD_BYTES = 2**30
#: Most numbers in one operator; beyond, features are cut to their leading principal directions.
MAX_VALUES = 2**22


@dataclass(frozen=True)
class Queries:
    """Queries as the scoring pass needs them, q of them."""

    #: Shape ``(q, r, c)``.
    solved: Tensor
    #: Effects of the operators, shape ``(q, K)``; empty without operators.
    measurements: Tensor
    #: Shape ``(q,)``.
    losses: Tensor


class SequenceStride:
    r"""Steering operators of a language model, and the influence they give in closed form.

    It is a :class:`~stride_lightning.steering.fit.Fit`. Features ``phi`` are the inputs of a few layers at every token,
    ``e`` the gradient of the token's loss in the steered space. With ``G_i = sum_t w_t phi_t e_t'`` for sequence ``i``,
    the score is the first-order influence of the convex problem that all operators share,

    .. math:: w_{qi} = \frac{1}{W} \langle G_q, A^{-1} G_i B^{-1} \rangle, \quad
              A = \frac{1}{W} \sum w \phi \phi', \; B = \frac{1}{W} \sum w e e',

    sums over all training tokens and ``W`` the sum of their weights. The factors of the curvature are an approximation,
    as is cutting features to their leading directions where ``r c > 2^22``; everything else is exact. The network runs
    forward only.

    Memory: ``24 (r^2 + c^2)`` bytes for the moments (``c`` in place of ``c^2`` beyond 1024), ``4 q r c`` for the
    queries (at most 1 GiB: more take more passes), ``4 K r c`` for operators (cut to 1 GiB), and one batch (256 MiB of
    logits at most, or one sequence). Only the scores grow with the number of training sequences.

    Args:
        task: The losses.
        options: Layers are five by default; of a learned basis, the one whose input is steered.

    Reference: arXiv:2606.05165 (STRIDE), steering operators in hidden-state space; the closed form is ours.
    """

    def __init__(self, task: CausalLanguageModeling, options: FitOptions) -> None:
        self.task, self._given = task, options
        self._is_learned = self._given.basis == "learned"
        self.layers: list[str] = [] if self._is_learned else list(self._given.layers or [])
        self.design: Design | None = None
        self.operators: TokenOperators | None = None
        self.hidden: HiddenStateOperators | None = None
        #: What was chosen, and what it cost; plain values.
        self.info: dict[str, Any] = {}
        self.metadata: dict[str, Any] = {"sequences": self.info}
        self.options: dict[str, Any] = {}
        self.train_targets: Tensor | None = None

    def choose_layers(self, model: nn.Module, inputs: Any, size: int = 0) -> list[str]:
        """Five layers with a weight matrix, evenly spaced from first to last."""
        size, num_tokens = inputs["input_ids"].shape
        forward = partial(self.task.outputs, model, inputs)
        return choose_layers(model, forward, size, MAX_TOKEN_LAYERS, num_tokens=num_tokens)

    def prepare(self, model: nn.Module, train: Examples, device: torch.device, record: Record | None = None) -> None:
        """Look at the model and a first batch: layers, where to steer, and what identifies the data."""
        head = first_batch(train, min(self._given.batch_size, 4), device)
        with train.naming(0):
            self.task.check_batch(model, head)
        inputs = self.task.inputs(head)
        space = choose_output_space(model, lambda: self.task.outputs(model, inputs))
        if record is not None:
            self.layers = record.info["layers"]
        elif not self.layers:
            self.layers = self.choose_layers(model, inputs)
        description = "Reading" if self._given.show_progress else ""
        texts = survey(train, self.task, model, space.vocabulary, description=description)
        if self.task.is_normalised:
            self.task = self.task.with_mean_weight(required(texts.kinds))
        self.fingerprint, self.space = texts.fingerprint, replace(space, longest=texts.longest)
        self._device = device
        self._is_recorded = record is not None and "moments" in record.groups
        self.reader = TokenReader(
            model,
            self.task,
            self.layers,
            self.space,
            batch_size=self._given.batch_size,
            device=device,
            show_progress=self._given.show_progress,
        )
        identity = {
            "weights": self._given.weights,
            "data": self.fingerprint,
            "layers": list(self.layers),
            "steered": self.space.kind,
            "task": repr(self.task),
        }
        self.passes = TrainingPasses(self.reader, train, required(texts.num_tokens), self._given.cache_dir, identity)
        if self.passes.cache is not None:
            self.info["cache_bytes"] = size = self.passes.cache.num_bytes
            announce(
                f"STRIDE stores {size / 2**20:.0f} MiB of activations in {self._given.cache_dir}.", show=size > 2**30
            )

    def expect(self, design: Design | None, num_queries: int) -> None:
        """Tell the call in progress how many passes will come."""
        if not self._is_recorded:
            expect("Statistics", len(self.passes))
        if design is not None and not self._is_learned:
            expect("Operators", len(self.passes))
        if num_queries and self._given.recovery in ("closed-form", "prior"):
            expect("Scores", len(self.passes))
        expect("Queries", num_queries)

    def fit(self, design: Design | None = None, record: Record | None = None) -> None:
        """Sum up all training tokens, or take the sums from a record; then fit the operators of a design, if any."""
        self.design, started = design, time.perf_counter()
        if record is None or not self._is_recorded:
            self._sum_up()
        else:
            stored = dict(record.tensors("moments"))
            self.losses = stored.pop("losses")
            self.moments = TokenMoments(**{name: values.to(self._device) for name, values in stored.items()})
        self.curve()
        self.info["seconds"] = {"statistics": 0.0 if self._is_recorded else time.perf_counter() - started}
        if design is None:
            return
        started = time.perf_counter()
        if self._is_learned:
            self._learn_operators(design)
        else:
            self.fit_operators(design, record)
        self.info["seconds"]["operators"] = time.perf_counter() - started

    def _sum_up(self) -> None:
        moments = TokenMoments.zeros(sum(self.reader.widths), self.space, self._device)
        losses = torch.empty(len(self.passes), dtype=self.reader.dtype)
        for batch in self.passes("Statistics"):
            moments.update(batch)
            losses[self.passes.within(batch.places)] = batch.losses.cpu()
        self.moments = TokenMoments(*map(total, vars(moments).values()))
        self.losses = gather(losses, len(self.passes.train))

    def curve(self) -> None:
        """Make the curvature of the moments."""
        count = 1 if self.design is None else self.design.num_subsets
        self.curvature = TokenCurvature(
            self.moments,
            self.reader.widths,
            max_values=max(1024, min(MAX_VALUES, HELD_BYTES // (4 * count))),
            dtype=self.reader.dtype,
            device=self._device,
        )
        self.reader.num_values = math.prod(self.curvature.shape)
        self.info |= {
            "steered": self.space.kind,
            "num_features": sum(self.reader.widths),
            "operator_shape": list(self.curvature.shape),
            "kept_energy": list(self.curvature.energy_shares),
            "num_tokens": int(self.moments.sums[2]),
            "mean_train_loss": self.moments.mean_loss,
        }

    def fit_operators(self, design: Design, record: Record | None = None) -> None:
        """Fit the operators of a design, or take those of a record if they are what the options ask for."""
        is_restored = (
            record is not None
            and self.curvature.is_whole  # where something was cut, operators stand in directions of their own
            and "operators" in record.groups
            and design.info() == record.info["design"]
        )
        self.metadata["operators"] = {"num_subsets": design.num_subsets, "from_record": is_restored}
        if record is not None and is_restored:
            coefficients = record.tensors("operators")["coefficients"].to(self._device)
            self.operators = TokenOperators(coefficients)
        else:
            self.operators = fit_token_operators(self.passes, design, self.curvature)

    def _learn_operators(self, design: Design) -> None:
        """Fit operators on a hidden state inside the network, as published."""
        layers = self._given.layers
        if layers is not None and len(layers) != 1:
            raise ValueError(f"basis='learned' steers one hidden state: name one layer, not {layers}.")
        self.hidden = HiddenStateOperators(
            self.reader.model,
            self.task,
            design,
            layer=None if layers is None else layers[0],
            rank=self._given.known_rank,
            seed=self._given.seed,
        )
        self.hidden.fit_operators(self.passes.train, self._device, show_progress=self._given.show_progress)
        self.info |= {"steered": self.hidden.layer, "rank": self._given.known_rank, "steps": self.hidden.max_steps}

    def effects(self, queries: Examples, target: str, weights: Tensor) -> Tensor:
        """Refused: texts have no readout that could be refit."""
        raise ValueError(
            "effect() refits a readout without each group, and texts have none: their scores are a closed form at the "
            "model's own logits. Sum scores over groups with Attribution.sum_by(), or retrain with retrain_without()."
        )

    def self_influence(self) -> None:
        """Scores of the training sequences as queries tell it."""

    def record(self) -> FitRecord:
        """The moments and losses, and the operators if there are any."""
        tensors = {"moments": {**vars(self.moments), "losses": self.losses}}
        if self.operators is not None:
            tensors["operators"] = {"coefficients": self.operators.coefficients}
        return FitRecord(tensors)

    def ask(self, queries: Examples, target: str = "label") -> Answers:
        """Measure the queries and compute their influence, as many at once as may be held."""
        if target == "predicted":
            self.task.predict(torch.empty(0))  # which says what to do instead
        parts, priors = [], []
        for places in torch.arange(len(queries)).split(self.queries_per_pass()):
            part = self.measure(queries.subset(places.tolist()))
            parts.append((part.losses, part.measurements))
            if self._given.recovery in ("closed-form", "prior"):
                priors.append(self.influence(part))
        losses, measured = map(torch.cat, zip(*parts, strict=True))
        if self.design is not None:
            check_measurements(measured, self.design)
            # An operator stands for a subset in place of all data, so that each member counts for n / |S| of its kind.
            measured = measured * (self.design.degree / self.design.num_subsets)
        prior = torch.cat(priors) if priors else None
        return Answers(losses, measured, fingerprint_of(queries), prior=prior)

    def measure(self, queries: Examples) -> Queries:
        """Run over the queries: their side of the scores and the effects of the operators; ranks share them."""
        share, count = shard(len(queries)), 0 if self.design is None else self.design.num_subsets
        size = share.stop - share.start
        solved = self.curvature.zeros(size)
        losses, measured = solved.new_zeros(size), solved.new_zeros(size, count)
        with_logits = self.operators is not None
        for batch in self.reader.batches(queries, "Queries", share=share, with_logits=with_logits):
            rows = slice(batch.places.start - share.start, batch.places.stop - share.start)
            solved[rows] = self.curvature.solve(self.curvature.gradients(batch))
            losses[rows] = batch.losses
            if self.operators is not None:
                measured[rows] = measure_tokens(batch, self.operators.coefficients, self.curvature, self.space)
        if self.hidden is not None and size:
            part = queries.subset(range(share.start, share.stop))
            measured = self.hidden.measure(part, self._device, show_progress=self._given.show_progress).to(measured)
        return Queries(*(gather(part, len(queries)) for part in (solved, measured, losses)))

    def queries_per_pass(self) -> int:
        """Queries that one pass over the training data can score."""
        return max(1, HELD_BYTES // (4 * math.prod(self.curvature.shape)))

    def influence(self, queries: Queries) -> Tensor:
        """Scores of every training sequence for the queries, on the CPU, shape ``(q, n)``; ranks share the work."""
        scores = torch.empty(len(queries.solved), len(self.passes), dtype=self.reader.dtype)
        for batch in self.passes("Scores"):
            columns = self.passes.within(batch.places)
            scores[:, columns] = self.curvature.influence(queries.solved, self.curvature.gradients(batch)).cpu()
        return gather(scores, len(self.passes.train), dim=1)
