"""method="information-loss" and "information-gain": how much an example tells of a query, in nats."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import fingerprint_of
from stride_lightning.data.sources import resolve_queries
from stride_lightning.gradients.planned import PlannedAttributor
from stride_lightning.gradients.reading import AnyReader
from stride_lightning.information.coreset import Coreset, choose_coreset
from stride_lightning.information.evidence import Evidence, fit_evidence
from stride_lightning.information.forms import Form, index_vectors, nats, query_vectors
from stride_lightning.information.greedy import greedy_sets
from stride_lightning.information.loss import pair_nats
from stride_lightning.information.posterior import Posterior, check_ridge
from stride_lightning.information.tangent import Likelihood, TangentFeatures, Tangents
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.scores import AttributionResult
from stride_lightning.results.top_attribution import TopAttribution
from stride_lightning.results.top_examples import TopExamples
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import gather, total
from stride_lightning.runtime.progress import expect
from stride_lightning.tasks.likelihoods import Regression
from stride_lightning.tasks.task import Task

#: Bytes of the features of training examples that are held between calls.
KEPT_BYTES = 2**29
#: Diverse examples are chosen among this many, or among this many for each of them.
NUM_CANDIDATES, CANDIDATES_EACH = 500, 10
#: Where diverse examples are chosen: variance of an example's output under the prior, in units of its noise.
_SIGNAL_TO_NOISE = 1e6


class InformationAttributor(PlannedAttributor):
    r"""The base of both methods: a Gaussian process on tangent features, whose posterior describes each query.

    The model is linearised at its weights, which have a Gaussian prior and a posterior given the training data. Scores
    are **unsigned**, in nats of the entropy of the predicted output of a query: they say how much an example tells of
    it, not whether it helps. Labels enter through the weights only.

    Memory beyond the model: ``24 k^2`` bytes for k features, ``4 C k`` for each query, the features of the training
    examples (``4 n C k`` bytes, up to 512 MiB; beyond that every pass computes them again), and ``4 q n`` for
    the scores.

    Args:
        likelihood: ``"gauss-newton"``, the noise of all outputs; or ``"margin"``, that of the target's log-odds alone,
            which takes C times less work.
        projection_dim: Number of features k.
        ridge: Prior precision of the weights where the noise is 1; by default where the evidence is largest.
        signed: Give scores the sign of the first-order influence: positive where the example lowers the query's loss.
        kwargs: Arguments of :class:`~stride_lightning.gradients.planned.PlannedAttributor`.

    Reference: arXiv:2604.03858. The derivations are this library's.
    """

    #: Which information.
    form: ClassVar[Form]

    def __init__(
        self,
        *,
        likelihood: Likelihood = "gauss-newton",
        projection_dim: int = 512,
        ridge: float | None = None,
        signed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if likelihood not in get_args(Likelihood):
            raise ValueError(f"`likelihood` must be one of {get_args(Likelihood)}, got {likelihood!r}.")
        if not isinstance(signed, bool):
            raise ValueError(f"`signed` must be True or False, got {signed!r}.")
        self.likelihood: Likelihood = likelihood
        self.projection_dim, self.signed = check_count("projection_dim", projection_dim), signed
        self.ridge = None if ridge is None else check_ridge(ridge)
        if self.ridge == 0 and self.form == "gain":
            raise ValueError("A gain is relative to a prior, and `ridge=0` means no prior: give a positive number.")
        #: How probable each prior precision is; None where the caller gave the ridge.
        self.evidence: Evidence | None = None

    @override
    def options(self) -> dict[str, Any]:
        names = ("likelihood", "projection_dim", "signed")
        return super().options() | {name: getattr(self, name) for name in names}

    @override
    def fit_model(self, model: nn.Module, device: torch.device, record: str | Path | None, checkpoint: Any) -> None:
        if record is not None:
            raise ValueError(f"method={self.method!r} reads no record. Leave out `record`.")
        if self.task.has_tokens:
            raise ValueError(
                f"method={self.method!r} is defined for models with one prediction per example, and a task of "
                f"{self.task.name} has one for each token. Use method='ekfac', 'trak' or 'logra' for language models."
            )
        self.plan(model, device)
        if self.own_plan is not None and self.own_plan.kind == "coupled":
            raise ValueError(
                f"method={self.method!r} needs a loss of each example, and that of a batch couples its examples. "
                "Use method='grad-dot', 'ekfac' or 'trak', or pass `loss=`, a function of (model, batch) that returns "
                "the loss of each example."
            )
        self.tangents = TangentFeatures(
            self.capture, self.likelihood, self.projection_dim, self.seed, signed=self.signed
        )
        work = self.tangents.work(self.effort, self.reader.num_outputs)
        expect("Tangent features", self.share.stop - self.share.start, work)
        expect("Queries", self.expected_queries, work)
        self._held: list[Tangents] | None = []
        gram = torch.zeros(self.tangents.dim, self.tangents.dim, dtype=torch.float64, device=device)
        losses, size = torch.zeros((), dtype=torch.float64, device=device), 0
        for batch in self.tangents.batches(self.reader, self.share, "Tangent features"):
            rows = batch.rows.flatten(0, 1)
            gram.addmm_(rows.T.double(), rows.double())
            losses += batch.losses.double().sum()
            size += batch.num_bytes
            if self._held is not None:
                self._held.append(batch)
                self._held = self._held if size <= KEPT_BYTES else None
        gram, losses = total(gram), total(losses)
        precision = max(torch.finfo(weight.dtype).eps for weight in self.capture.parameters.values())
        ridge = self._choose_ridge(gram, float(losses)) if self.ridge is None else self.ridge
        self.posterior = Posterior(gram, ridge, num_examples=len(self.train_data), precision=precision)
        self.metadata["posterior"] = {
            "ridge": ridge,
            "mean_squared_feature": float(gram.trace()) / len(self.train_data),
            **({} if self.evidence is None else self.evidence.described()),
        }

    def _choose_ridge(self, gram: Tensor, losses: float) -> float:
        weights = sum(float(weight.detach().double().square().sum()) for weight in self.capture.parameters.values())
        # The distribution of labels gives their noise; the noise of a regression is unknown.
        scale = self.task.dispersion if isinstance(self.task, Task) else 1.0
        noise = None if isinstance(self.task, Regression) else 1 / scale
        num_rows = len(self.train_data) * self.reader.num_outputs
        self.evidence = fit_evidence(gram, weights, 2 * losses, num_rows, noise_variance=noise)
        return self.evidence.ridge

    @override
    def score_queries(
        self, model: nn.Module, queries: Examples, device: torch.device, target: str
    ) -> Attribution | TopAttribution:
        reader = self.read_queries(model, queries, device, target)
        tile = partial(self._tile, *self._query_side(reader))
        attribution = self.collect_scores(reader, [slice(0, len(reader))], lambda _: tile)
        attribution.metadata["unit"] = f"nats{'' if self.signed else ', unsigned'}"
        return attribution

    def _query_side(self, reader: AnyReader) -> tuple[Tensor, Tensor | None]:
        """Vectors of queries, ``(q, C, k)``; where signed, whitened gradients of minus their losses, ``(q, k)``."""
        batches = list(self.tangents.batches(reader, None, "Queries", as_queries=True))
        vectors = torch.cat([query_vectors(batch.rows, self.posterior, self.form) for batch in batches])
        if not self.signed:
            return vectors, None
        downhill = torch.cat([batch.downhill for batch in batches if batch.downhill is not None])
        return vectors, self.posterior.whiten(downhill)

    def _tile(self, queries: Tensor, downhill: Tensor | None, columns: slice) -> Tensor:
        """Information of some training examples about the queries, shape ``(q, columns)``."""
        parts = [queries.new_empty(len(queries), 0)]
        for batch in self._training(columns):
            part = pair_nats(queries, index_vectors(batch.rows, self.posterior, self.form), self.form)
            if downhill is not None and batch.downhill is not None:
                part = part * torch.sign(downhill @ self.posterior.whiten(batch.downhill).T)
            parts.append(part)
        return torch.cat(parts, 1)

    def _training(self, columns: slice) -> Iterator[Tangents]:
        """Features of some training examples of this process, batch by batch."""
        if self._held is not None:
            return (batch.between(columns) for batch in self._held)
        # Whole batches: those that are cut elsewhere are rounded differently.
        size = self.reader.batch_size
        stop = min(-(-columns.stop // size) * size, len(self.train_data))
        share = slice(columns.start - columns.start % size, stop)
        return (batch.between(columns) for batch in self.tangents.batches(self.reader, share, "Information"))

    def diverse(self, attribution: AttributionResult, k: int | None = None) -> TopExamples:
        """Training examples chosen one after the other, each for the information it adds: no near-copies.

        The candidates are the 500 (or ``10 k``) with the highest scores. The choice treats labels as if they had no
        noise. Every process must call it.

        Args:
            attribution: The result of :meth:`attribute`, of this attributor or of one that was fitted alike. A loaded
                attribution needs its queries: ``Attribution.load(path, queries=queries)``.
            k: How many for each query, by default 10; all examples if there are fewer.

        Returns:
            Positions in the training dataset and the nats that each adds, both of shape ``(num_queries, k)``; there are
            no opponents.

        Raises:
            ValueError: If ``k`` is below 1, scores are signed, or the attribution is of other weights, data or options.
        """
        queries = self._checked_queries(attribution)
        size = attribution.top_columns(k).proponents.shape[1]
        wanted = min(attribution.num_train, max(NUM_CANDIDATES, CANDIDATES_EACH * size))
        if attribution.num_ranked < wanted:
            raise ValueError(
                f"diverse() chooses among the {wanted} strongest of each query, and the attribution holds "
                f"{attribution.num_ranked}: attribute with `top_k={wanted}`, or without `top_k`."
            )
        candidates = attribution.top_columns(wanted).proponents
        with self.borrowed_model() as (model, device):
            reader = self.read_queries(model, queries, device, attribution.metadata["target"])
            is_whole = len(queries) == attribution.metadata["num_queries"]
            if is_whole and reader.fingerprint != attribution.metadata["query_data"]:
                raise ValueError(
                    "The attribution was loaded with other queries: load it with the queries that it was computed for."
                )
            query_rows = torch.cat([batch.rows for batch in self.tangents.batches(reader, as_queries=True)])
            every, places = candidates.unique(return_inverse=True)
            chosen = self.read_training(model, self.train_data.subset(every.tolist()), device)
            features = torch.cat([batch.rows for batch in self.tangents.batches(chosen)])
        # As if labels had no noise: a copy would halve that noise, and so seem to tell something new.
        mean = self.metadata["posterior"]["mean_squared_feature"]
        features = features * (_SIGNAL_TO_NOISE * self.posterior.ridge / mean if mean > 0 else 1.0) ** 0.5
        columns, gains = [], []
        for query, among in zip(query_rows, places, strict=True):
            sets = greedy_sets(features[among], query[None], self.posterior, size, form="gain")
            columns.append(every[among[sets.places[0].cpu()]])
            gains.append(torch.diff(sets.nats[0], prepend=sets.nats.new_zeros(1)).float().cpu())
        none = torch.empty(len(queries), 0)
        top = TopExamples(torch.stack(columns), torch.stack(gains), none.long(), none, is_signed=False)
        return top.renamed(attribution.train_indices)

    def _checked_queries(self, attribution: AttributionResult) -> Examples:
        """The queries of an attribution, which must be of the model and data that this attributor was fitted to."""
        self.check_fitted("diverse(attribution)")
        if self.signed:
            raise ValueError(
                "diverse() needs unsigned scores: how much an example tells. Signed scores say whether it helps. "
                "Make the attributor without `signed=True`."
            )
        names = ("method", "weights", "data", "task", "seed", "options")
        others = [name for name in names if attribution.metadata.get(name) != self.metadata.get(name)]
        if others:
            raise ValueError(
                f"The attribution is not of the model, data and options of this attributor. These differ: "
                f"{', '.join(others)}. Give diverse() the result of attribute(queries) of this attributor."
            )
        if attribution.queries is None:
            raise ValueError(
                "The attribution holds no queries: load it with `Attribution.load(path, queries=queries)`."
            )
        return attribution.queries

    def coreset(self, size: int) -> Coreset:
        """Training examples chosen one after the other for most information about all weights; needs :meth:`fit`.

        A greedy set has at least 63 % of the information of the best set of its size. Every process must call it, and
        computes all of it. Memory: ``8 n C k`` bytes. Places of the coreset are positions in the training dataset.
        """
        self.check_fitted("coreset()")
        check_count("size", size, maximum=len(self.train_data))
        with self.borrowed_model():
            everything = slice(0, len(self.train_data))
            whole = self._training(everything) if self.share == everything else self.tangents.batches(self.reader)
            features = torch.cat([batch.rows for batch in whole])
        chosen = choose_coreset(features, size, self.posterior.prior())
        return chosen._replace(places=self.train_data.positions[chosen.places.cpu()])

    @override
    def score_training_data(self, model: nn.Module, device: torch.device) -> Tensor:
        # Queries combine many outputs along other directions than training examples do.
        batches = self.tangents.batches(self.reader, self.share, "Self-influence", as_queries=True)
        queries = None if self.tangents.is_exact else torch.cat([batch.rows for batch in batches])
        parts = []
        for batch in self._training(self.share):
            rows = slice(batch.places.start - self.share.start, batch.places.stop - self.share.start)
            query = query_vectors(batch.rows if queries is None else queries[rows], self.posterior, self.form)
            parts.append(nats(query @ index_vectors(batch.rows, self.posterior, self.form).mT, self.form))
        return gather(torch.cat(parts).float().cpu(), len(self.train_data))

    @property
    def vector_shape(self) -> tuple[int, int]:
        """``(C, k)``: how many vectors stand for an example, and their length; needs :meth:`fit`."""
        return self.tangents.num_rows, self.tangents.dim

    def vectors(self, places: Tensor, form: Form | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Vectors of the training examples at some places, in the method's form or another.

        Yields:
            Some of the places, ``(b,)``, and the vectors of :func:`index_vectors`, ``(b, C, k)`` on the CPU.
        """
        if len(places) == 0:
            return
        with self.borrowed_model() as (model, device):
            reader = self.read_training(model, self.train_data.subset(places.tolist()), device)
            for batch in self.tangents.batches(reader):
                yield places[batch.places], index_vectors(batch.rows, self.posterior, form or self.form).cpu()

    def query_vectors(self, queries: Any, target: str = "label", form: Form | None = None) -> Tensor:
        """Vectors to search with among those of :meth:`vectors`, ``(q, C, k)`` on the CPU."""
        with self.borrowed_model() as (model, device):
            reader = self.read_queries(model, resolve_queries(queries, model, self.train_data), device, target)
            batches = self.tangents.batches(reader, None, "Queries", as_queries=True)
            return torch.cat([query_vectors(batch.rows, self.posterior, form or self.form).cpu() for batch in batches])

    def identity(self, form: Form | None = None, num_train: int | None = None) -> dict[str, Any]:
        """Plain values that determine the vectors: the weights, the features, the prior and the data.

        The data are all training examples, or the first `num_train`, which are enough for an index of gains.
        """
        form, data = form or self.form, self.metadata["data"]
        if num_train is not None and num_train < len(self.train_data):
            part = self.train_data.subset(range(num_train))
            data = fingerprint_of(part)
        identity = {
            "weights": self.weights,
            "task": repr(self.task),
            "layers": None if self.layers is None else list(self.layers),
            "likelihood": self.likelihood,
            "projection_dim": self.tangents.dim,
            "seed": self.seed,
            "form": form,
            "ridge": self.posterior.ridge,
            "data": data,
        }
        if form == "gain" or data["content"] is not None:
            return identity
        # Random augmentation leaves only shapes and targets to identify the data by: their features tell more.
        return identity | {"mean_squared_feature": f"{self.metadata['posterior']['mean_squared_feature']:.3g}"}


class InformationLossAttributor(InformationAttributor):
    """Information loss: how much less the model would know of a query without the example, in nats.

    ``1/2 log(1 + c^2 / ((1 - s) (1 + v)))`` for one output, with the posterior covariance c of example and query and
    their variances s and v. One of several copies of an example scores low, since the others tell the same.
    """

    method, form = "information-loss", "loss"


class InformationGainAttributor(InformationAttributor):
    """Information gain: how much the example alone tells of a query, before any other is seen, in nats.

    ``-1/2 log(1 - c^2 / ((1 + s) (1 + v)))`` for one output, with covariances of the prior: the squared cosine of the
    two gradients, damped by the ridge.
    """

    method, form = "information-gain", "gain"
