"""How StrideAttributor attributes language models: from its options to an Attribution."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stride_lightning.attribution import Attribution
from stride_lightning.data import Examples
from stride_lightning.language import CausalLanguageModeling
from stride_lightning.steering.recovery import Recovery, check_measurements, recover_with_prior
from stride_lightning.steering.sequences import SequenceStride
from stride_lightning.steering.subsets import sample_design

if TYPE_CHECKING:
    from stride_lightning.steering.attributor import StrideAttributor


def fitted_sequences(options: StrideAttributor, model: nn.Module, device: torch.device) -> SequenceStride:
    """The pass over the training sequences, and the operators if the recovery measures any."""
    task = options._task
    assert isinstance(task, CausalLanguageModeling)
    found = SequenceStride(
        task,
        layers=options.layers,
        **({} if options.ridge is None else {"damping": options.ridge}),
        batch_size=options.batch_size,
        cache_dir=options.cache_dir,
        show_progress=options.show_progress,
    )
    found.fit(model, options._train, device, {"weights": options._weights})
    if options.recovery != "closed-form":
        design = sample_design(len(options._train), options.num_subsets, options.degree, seed=options.seed)
        found.fit_operators(design, steps=options.steps)
    options.metadata |= {
        "unit": "nats of query loss",
        "options": {"layers": list(found.layers or []), "basis": options.basis, "recovery": options.recovery},
        "design": None if found.design is None else found.design.info(),
        "data": found.fingerprint,
        "sequences": found.info,
    }
    return found


def attribute_sequences(
    options: StrideAttributor,
    found: SequenceStride,
    queries: Examples,
    target: str,
) -> Attribution:
    """Scores of the training sequences for some queries."""
    if target == "predicted":
        found.task.predict(torch.empty(0))  # which says what to do instead
    started = time.perf_counter()
    priors, measurements, losses = [], [], []
    for chunk in torch.arange(len(queries)).split(found.queries_per_pass()):
        asked = found.ask(queries.subset(chunk.tolist()))
        measurements.append(asked.measurements)
        losses.append(asked.losses)
        if options.recovery in ("closed-form", "prior"):
            priors.append(found.influence(asked))
    recovered = _recovered(options, found, torch.cat(measurements), priors)
    return Attribution(
        recovered.scores.float().cpu(),
        None if recovered.std is None else recovered.std.float().cpu(),
        metadata={
            "recovered": recovered.chosen,
            "query_data": found.fingerprint_of(queries),
            "attribute_seconds": {"all": time.perf_counter() - started},
            "mean_query_loss": float(torch.cat(losses).mean()),
        },
    )


def _recovered(
    options: StrideAttributor, found: SequenceStride, measurements: Tensor, priors: list[Tensor]
) -> Recovery:
    if options.recovery == "closed-form":
        return Recovery(torch.cat(priors))
    assert found.design is not None
    check_measurements(measurements, found.design)
    if options.recovery == "prior":
        prior = torch.cat(priors).to(measurements)
        return recover_with_prior(measurements, found.design, prior, show_progress=options.show_progress)
    return options.recover_whole(measurements, found.design)
