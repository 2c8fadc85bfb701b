from itertools import pairwise

import pytest
import torch

from stride_lightning import StrideAttributor
from stride_lightning.data.sources import resolve_queries
from stride_lightning.steering.language import operators as token_operators
from stride_lightning.steering.language.operators import fit_token_operators, measure_tokens
from stride_lightning.steering.subsets import Design, sample_design
from tests.helpers.texts import Texts, TinyLM
from tests.helpers.tiny import correlation
from tests.steering.language.test_sequences import LAYERS, QUERIES, loader

TRAIN = Texts(9)
DESIGN = sample_design(9, 4, 2, seed=1)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def fitted():
    attributor = StrideAttributor(layers=LAYERS, show_progress=False)
    return attributor.fit(TinyLM().double().eval(), loader(TRAIN)).fitted


def operators_of(fitted, design=DESIGN, **options):
    return fit_token_operators(fitted.passes, design, fitted.curvature, fitted.space, **options)


def batches(fitted, data=TRAIN, with_logits=True):
    with torch.no_grad():
        return list(fitted.reader.batches(fitted.passes.train if data is TRAIN else data, "", with_logits=with_logits))


def gradients(fitted):
    return torch.cat([fitted.curvature.gradients(batch) for batch in batches(fitted)])


def objective(fitted, operator, members):
    """``F_k`` of one operator, sequence by sequence."""
    total = 0.0
    for batch in batches(fitted):
        for row in range(len(batch.losses)):
            member = members[batch.places.start + row]
            if not member:
                continue
            moved = fitted.curvature.features(batch.features[row]) @ operator
            logits = batch.logits[row] + fitted.space.push(fitted.curvature.steering(moved))
            losses = logits.logsumexp(1) - logits.gather(1, batch.labels[row][:, None])[:, 0]
            total = total + (losses * batch.weights[row]).sum() - batch.losses[row]
    mean = gradients(fitted).mean(0)
    penalty = (operator * fitted.curvature.penalty(operator)).sum() / 2
    return total / members.sum() - (mean * operator).sum() + penalty


def test_one_step_is_the_closed_form(fitted):
    operators = operators_of(fitted)
    every, members = gradients(fitted), DESIGN.dense(torch.float64)
    slopes = (members @ every.flatten(1)).view(4, *every.shape[1:]) / members.sum(1)[:, None, None] - every.mean(0)
    assert torch.allclose(operators.coefficients, -fitted.curvature.solve(slopes))
    assert operators.relative_gradient.isnan().all()


def test_further_steps_reach_the_optimum(fitted):
    operators = operators_of(fitted, steps=60)
    assert float(operators.relative_gradient.max()) < 1e-4
    for subset, members in enumerate(DESIGN.dense(torch.bool)):
        best = operators.coefficients[subset].clone().requires_grad_()
        value = objective(fitted, best, members)
        (slope,) = torch.autograd.grad(value, best)
        best = best.detach()
        assert float(slope.norm()) < 1e-4
        nudged = objective(fitted, best + 1e-2 * torch.randn_like(best), members)
        assert float(nudged) > float(value.detach())
        # The closed form was already most of the way.
        assert float(objective(fitted, torch.zeros_like(best), members)) == pytest.approx(0)
        assert float(value.detach()) < 0


def test_the_operator_of_all_data_is_zero(fitted):
    design = Design.from_masks(torch.stack([torch.ones(9, dtype=torch.bool), torch.arange(9) < 4]))
    operators = operators_of(fitted, design, steps=3)
    assert float(operators.coefficients[0].abs().max()) < 1e-10
    assert float(operators.coefficients[1].abs().max()) > 1e-3


@pytest.mark.parametrize("steered_bytes", [1, 2**26])
def test_measurements_are_differences_of_losses(fitted, monkeypatch, steered_bytes):
    monkeypatch.setattr(token_operators, "STEERED_BYTES", steered_bytes)
    operators = torch.randn(4, *fitted.curvature.shape)
    for batch in batches(fitted, resolve_queries(loader(QUERIES))):
        measured = measure_tokens(batch, operators, fitted.curvature, fitted.space)
        for row in range(len(batch.losses)):
            for subset, operator in enumerate(operators):
                moved = fitted.curvature.features(batch.features[row]) @ operator
                logits = batch.logits[row] + moved
                losses = torch.nn.functional.cross_entropy(logits, batch.labels[row], reduction="none")
                expected = batch.losses[row] - (losses * batch.weights[row]).sum()
                assert float(measured[row, subset]) == pytest.approx(float(expected), rel=1e-9)


def test_measurements_add_up_the_scores_to_first_order(fitted):
    """A subset helps a query by the sum of its members' scores, but for what is not linear."""
    design = sample_design(9, 6, 3, seed=0)
    fitted.fit(design)
    observed = fitted.measure(resolve_queries(loader(QUERIES)))
    scores = fitted.influence(observed)
    sizes = design.sizes.double()
    expected = (design.responses(scores.float()).double() / sizes - scores.mean(1, keepdim=True)) * 9
    assert correlation(observed.measurements, expected) > 0.95


def test_steps_lower_the_objective_of_every_subset(fitted):
    values, members = [], DESIGN.dense(torch.bool)
    for steps in (1, 2, 5):
        coefficients = operators_of(fitted, steps=steps).coefficients
        values.append([float(objective(fitted, a, m)) for a, m in zip(coefficients, members, strict=True)])
    for before, after in pairwise(values):
        assert all(later <= earlier + 1e-9 for earlier, later in zip(before, after, strict=True))
