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


def operators_of(fitted, design=DESIGN):
    return fit_token_operators(fitted.passes, design, fitted.curvature)


def batches(fitted, data=TRAIN, with_logits=True):
    with torch.no_grad():
        return list(fitted.reader.batches(fitted.passes.train if data is TRAIN else data, "", with_logits=with_logits))


def gradients(fitted):
    return torch.cat([fitted.curvature.gradients(batch) for batch in batches(fitted)])


def test_operators_are_one_step_in_closed_form(fitted):
    operators = operators_of(fitted)
    every, members = gradients(fitted), DESIGN.dense(torch.float64)
    slopes = (members @ every.flatten(1)).view(4, *every.shape[1:]) / members.sum(1)[:, None, None] - every.mean(0)
    assert torch.allclose(operators.coefficients, -fitted.curvature.solve(slopes))


def test_the_operator_of_all_data_is_zero(fitted):
    design = Design.from_masks(torch.stack([torch.ones(9, dtype=torch.bool), torch.arange(9) < 4]))
    operators = operators_of(fitted, design)
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


def test_operators_help_their_subsets_more_than_the_rest(fitted):
    fitted.fit(DESIGN)
    measured = fitted.measure(fitted.passes.train).measurements.T
    members = DESIGN.dense(torch.bool)
    for effects, inside in zip(measured, members, strict=True):
        assert effects[inside].mean() > 0 > effects[~inside].mean()
