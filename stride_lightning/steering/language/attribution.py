"""How StrideAttributor attributes language models: from its options to an Attribution."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import fingerprint_of
from stride_lightning.results.attribution import Attribution
from stride_lightning.runtime.progress import announce
from stride_lightning.steering.language.sequences import SequenceStride
from stride_lightning.steering.recovery import Recovery, check_measurements, recover_with_prior
from stride_lightning.steering.subsets import Design, sample_design
from stride_lightning.tasks.language import CausalLanguageModeling

if TYPE_CHECKING:
    from stride_lightning.steering.attributor import StrideAttributor


def fitted_sequences(
    options: StrideAttributor, model: nn.Module, device: torch.device, explicit: str | Path | None, checkpoint: Any
) -> SequenceStride:
    """The pass over the training sequences, or what a record knows of it, and operators if recovery asks for any."""
    task = options.task
    assert isinstance(task, CausalLanguageModeling)
    if options.basis == "learned" and options.recovery == "closed-form":
        raise ValueError("recovery='closed-form' fits no operators, so basis='learned' has no part in it.")
    _check_options(options)
    options.find_record(model, explicit, checkpoint)
    found = _prepared(options, task, model, device)
    if options._record is not None and not options.keeps_record(found.fingerprint, explicit):
        found = _prepared(options, task, model, device)
    record = options._record
    found.design = None if options.recovery == "closed-form" else _design(options)
    if record is None:
        cost = found.estimate()
        announce(f"STRIDE: {cost}", show=options.show_progress and cost.is_long)
        found.fit()
    else:
        found.restore(record.tensors("moments"))
    if found.design is not None:
        _fit_operators(options, found, model, found.design)
    options.metadata |= {
        "options": {"layers": list(found.layers or []), "basis": options.basis, "recovery": options.recovery},
        "design": None if found.design is None else found.design.info(),
        "data": found.fingerprint,
        "record": None if record is None else str(record.path),
        "record_note": options._record_note,
        "sequences": found.info,
    }
    return found


def _check_options(options: StrideAttributor) -> None:
    """Refuse what would have no effect."""
    if options.recovery != "closed-form":
        return
    asked = {"num_subsets": options.num_subsets, "degree": options.degree, "stability": options._stability_asked}
    idle = [name for name, value in asked.items() if value is not None] + ["steps"] * (options.steps != 1)
    if idle:
        raise ValueError(
            f"recovery='closed-form', the default of language models, fits no operators, so {', '.join(idle)} would "
            "have no effect. Leave out, or pass recovery='prior'."
        )


def _prepared(
    options: StrideAttributor, task: CausalLanguageModeling, model: nn.Module, device: torch.device
) -> SequenceStride:
    asked = None if options.basis == "learned" else options.layers
    found = SequenceStride(
        task,
        layers=asked if options._record is None else options._record.info["layers"],
        **({} if options.ridge is None else {"damping": options.ridge}),
        batch_size=options.batch_size,
        cache_dir=options.cache_dir,
        seed=options.seed,
        show_progress=options.show_progress,
    )
    found.prepare(model, options.train_data, device, {"weights": options.weights})
    return found


def _design(options: StrideAttributor) -> Design:
    record = options._record
    if record is not None:
        design = Design.restore(record.info["design"], record.tensors("design"))
        asked = {"num_subsets": options.num_subsets, "degree": options.degree}
        if all(value in (None, getattr(design, name)) for name, value in asked.items()):
            return design
    return sample_design(len(options.train_data), options.num_subsets, options.degree, seed=options.seed)


def _fit_operators(options: StrideAttributor, found: SequenceStride, model: nn.Module, design: Design) -> None:
    if options.basis == "learned":
        layer = _one_layer(options)
        found.learn_operators(model, design, rank=options.rank or 16, layer=layer, stability=options.stability)
        return
    record, stored = options._record, None
    if record is not None and "operators" in record.groups and design.info() == record.info["design"]:
        same = options.steps == 1 and options.ridge is None
        stored = record.tensors("operators")["coefficients"] if same else None
    found.fit_operators(design, steps=options.steps, stored=stored)


def _one_layer(options: StrideAttributor) -> str | None:
    if options.layers is not None and len(options.layers) != 1:
        raise ValueError(f"basis='learned' steers one hidden state: name one layer, not {options.layers}.")
    return None if options.layers is None else options.layers[0]


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
            "query_data": fingerprint_of(queries, found.task),
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
    # An operator stands for a subset in place of all data, so that each member counts for n / |S| of its kind.
    measurements = measurements * (found.design.degree / found.design.num_subsets)
    if options.recovery == "prior":
        prior = torch.cat(priors).to(measurements)
        return recover_with_prior(measurements, found.design, prior, show_progress=options.show_progress)
    return options.recover_whole(measurements, found.design)
