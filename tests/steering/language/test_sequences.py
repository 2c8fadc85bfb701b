import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stride_lightning import CausalLanguageModeling, StrideAttributor, attribute
from stride_lightning.steering.language import curvature as token_curvature
from stride_lightning.steering.language import output_space, sequences, tokens
from stride_lightning.steering.language.activation_cache import ActivationCache
from stride_lightning.steering.subsets import sample_design
from tests.helpers.texts import VOCABULARY, Texts, TinyLM, brute_scores, padded
from tests.helpers.tiny import correlation

TRAIN, QUERIES = Texts(13), Texts(5, seed=1)
LAYERS = ["blocks.0", "blocks.2", "head"]


def loader(data, batch_size=4, collate_fn=padded):
    return DataLoader(data, batch_size=batch_size, collate_fn=collate_fn)


def ask(model, queries=QUERIES, train=TRAIN, **options):
    options = {"layers": LAYERS, "show_progress": False} | options
    return attribute(model, loader(queries), train_data=loader(train), **options)


def fit(model, **options):
    return StrideAttributor(layers=LAYERS, show_progress=False, **options).fit(model, loader(TRAIN))


def close(scores, expected, rtol=1e-5, atol=1e-9):
    torch.testing.assert_close(scores.double(), expected.double(), rtol=rtol, atol=atol)


@pytest.fixture
def model():
    torch.set_default_dtype(torch.float64)
    yield TinyLM().double().eval()
    torch.set_default_dtype(torch.float32)


def test_scores_are_the_closed_form(model):
    attribution = ask(model)
    assert attribution.std is None
    close(attribution.scores, brute_scores(model, TRAIN, QUERIES, LAYERS))
    assert attribution.metadata["options"]["recovery"] == "closed-form"
    assert attribution.metadata["sequences"]["steered"] == "logits"


def test_a_sum_over_tokens_weighs_long_sequences_more(model):
    mean, total = (ask(model, task=CausalLanguageModeling(reduction)).scores for reduction in ("mean", "sum"))
    assert not torch.allclose(mean / mean.norm(), total / total.norm(), atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_subsets": 8}], ids=["closed form", "operators"])
def test_a_mean_over_all_tokens_of_a_batch_is_the_sum_over_the_mean_number_of_tokens(model, options):
    total = ask(model, task=CausalLanguageModeling("sum"), **options)
    mean = ask(model, task=CausalLanguageModeling("sum", normalised=True), **options)
    labels = padded([TRAIN[i] for i in range(len(TRAIN))])["labels"]
    num_tokens = int((labels[:, 1:] != -100).sum()) / len(TRAIN)
    close(mean.scores, total.scores / num_tokens)
    factor = ask(model, task=CausalLanguageModeling("sum").with_scale(0.3), **options)
    close(factor.scores, 0.3 * total.scores)
    torch.testing.assert_close(mean.metadata["mean_query_loss"], total.metadata["mean_query_loss"] / num_tokens)


@pytest.mark.parametrize("cached", [False, True])
def test_large_vocabularies_keep_the_diagonal_of_their_curvature(model, monkeypatch, tmp_path, cached):
    monkeypatch.setattr(output_space, "MAX_DENSE", 3)
    options = {"cache_dir": tmp_path} if cached else {}
    attribution = ask(model, **options)
    assert attribution.metadata["sequences"]["steered"] == "logits"
    expected = brute_scores(model, TRAIN, QUERIES, LAYERS, diagonal=True)
    tolerance = 1e-4 if cached else 1e-5  # in single precision on disk
    close(attribution.scores, expected, tolerance, tolerance * float(expected.abs().max()))
    assert not torch.allclose(attribution.scores.double(), brute_scores(model, TRAIN, QUERIES, LAYERS), rtol=1e-3)
    if cached:  # what enters the head and the label, not what comes out
        tokens_seen = attribution.metadata["sequences"]["num_tokens"]
        assert attribution.metadata["sequences"]["cache_bytes"] == 4 * tokens_seen * (13 + 4 + 1 + 1)
        close(ask(model, **options).scores, expected, 1e-4, 1e-7)


def test_of_large_vocabularies_features_are_cut_alone(model, monkeypatch):
    monkeypatch.setattr(output_space, "MAX_DENSE", 3)
    monkeypatch.setattr(sequences, "HELD_BYTES", 1)
    monkeypatch.setattr(token_curvature, "MIN_FEATURES", 4)
    attributor = fit(model)
    assert attributor.metadata["sequences"]["operator_shape"] == [13, VOCABULARY]  # 1024 numbers are always kept
    cut = token_curvature.TokenCurvature(attributor.fitted.moments, attributor.fitted.reader.widths, max_values=1)
    assert cut.shape == (4, VOCABULARY)
    assert ask(model, recovery="prior", num_subsets=8).std is not None


def test_the_last_hidden_state_is_steered_under_large_vocabularies(model, monkeypatch):
    monkeypatch.setattr(output_space, "MAX_DIRECT", 3)
    attribution = ask(model)
    assert attribution.metadata["sequences"]["steered"] == "hidden"
    close(attribution.scores, brute_scores(model, TRAIN, QUERIES, LAYERS, head=model.head.weight.detach()))


def test_a_head_that_is_capped_is_sketched(model, monkeypatch):
    monkeypatch.setattr(output_space, "MAX_DIRECT", 3)
    monkeypatch.setattr(output_space, "SKETCH_SIZE", 4096)

    class Capped(TinyLM):
        def forward(self, input_ids):
            return 5 * torch.tanh(super().forward(input_ids) / 5)

    capped = Capped().double().eval()
    attribution, exact = ask(capped), brute_scores(capped, TRAIN, QUERIES, LAYERS)
    assert attribution.metadata["sequences"]["steered"] == "sketch"
    # Inner products of a sketch are right on average; the damping is over 4096 numbers, so only the order is compared.
    assert correlation(attribution.scores, exact) > 0.9


@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_batch_size_and_padding_change_nothing(model, batch_size):
    wider = loader(QUERIES, 2, lambda items: padded(items, extra=3))
    options = {"layers": LAYERS, "batch_size": batch_size, "show_progress": False}
    close(attribute(model, wider, train_data=loader(TRAIN, 3), **options).scores, ask(model).scores)


def test_batches_are_cut_to_what_logits_may_take(model, monkeypatch):
    expected = ask(model).scores
    monkeypatch.setattr(tokens, "BATCH_BYTES", 1)
    sizes = []
    model.register_forward_hook(lambda _, args, kwargs, out: sizes.append(len(out)), with_kwargs=True)
    close(ask(model).scores, expected)
    assert sizes[-len(TRAIN) :] == [1] * len(TRAIN)


def test_more_queries_than_fit_take_more_passes(model, monkeypatch):
    expected = ask(model).scores
    monkeypatch.setattr(sequences, "HELD_BYTES", 2 * 4 * 13 * VOCABULARY)
    attributor = fit(model)
    assert attributor.fitted.queries_per_pass() == 2
    close(attributor.attribute(loader(QUERIES)).scores, expected)


def test_large_operators_are_cut_to_principal_directions(model, monkeypatch):
    exact = ask(model)
    monkeypatch.setattr(sequences, "MAX_VALUES", 1024)  # more than there are: nothing is cut
    assert torch.equal(ask(model).scores, exact.scores)
    monkeypatch.setattr(token_curvature, "MIN_FEATURES", 4)
    fitted = fit(model).fitted
    cut = token_curvature.TokenCurvature(fitted.moments, fitted.reader.widths, max_values=16, dtype=torch.float64)
    assert cut.shape == (4, 4)
    assert fitted.curvature.is_whole
    assert not cut.is_whole
    # Operators that were stored stand in directions of their own, and are fitted again.
    stored, design = torch.ones(8, 4, 4), sample_design(len(TRAIN), 8)
    info, tensors = {"design": design.info()}, lambda _: {"coefficients": stored}
    record = SimpleNamespace(groups=("operators",), info=info, tensors=tensors)
    fitted.curvature, fitted.design = cut, design
    fitted.fit_operators(design, record)
    assert not torch.equal(fitted.operators.coefficients, stored)
    fitted.curve()
    assert all(0.3 < share < 1 for share in cut.energy_shares)
    whole = fitted.curvature
    batch = next(iter(fitted.passes("")))
    # The basis is orthonormal in scaled features: what it keeps is what projecting by hand keeps.
    scaled = whole.features(batch.features)
    left, right = cut.features(batch.features), cut.outputs(batch.downhill)
    assert float(left.norm()) < float(scaled.norm())
    assert torch.allclose(cut.steering(right).square().sum(), right.square().sum())


def test_half_precision_is_near_and_autocast_reaches_the_model_alone():
    model = TinyLM().eval()
    exact = ask(model).scores
    half = ask(copy.deepcopy(model).bfloat16()).scores
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ask(model).scores
    assert 0 < (mixed - exact).abs().max() < 0.1 * exact.abs().max()


def test_default_layers_are_spread_over_the_network(model):
    attribution = ask(model, layers=None)
    assert attribution.metadata["options"]["layers"] == ["blocks.0", "blocks.1", "blocks.2", "head"]


def test_recovery_with_a_prior_says_how_sure_it_is(model):
    attribution = ask(model, recovery="prior", num_subsets=12)
    assert (attribution.std > 0).all()
    assert correlation(attribution.scores, ask(model).scores) > 0.9
    assert attribution.metadata["design"]["num_subsets"] == 12


@pytest.mark.parametrize("recovery", ["lasso", "ridge"])
def test_other_recoveries_read_the_same_measurements(model, recovery):
    attribution = ask(model, recovery=recovery, num_subsets=40, penalty=0.01)
    assert correlation(attribution.scores, ask(model).scores) > 0.6


def test_what_belongs_to_other_models_is_refused(model):
    with pytest.raises(ValueError, match="fits no operators"):
        ask(model, basis="learned", recovery="closed-form", layers=["blocks.1"])
    with pytest.raises(ValueError, match="not for language models"):
        ask(model, target="predicted")
    with pytest.raises(ValueError, match="'nothing' is not a submodule"):
        ask(model, layers=["nothing"])
    with_more = copy.deepcopy(model)
    with_more.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Layer 'unused' did not run in the model's forward pass"):
        ask(with_more, layers=["unused"])


def test_the_model_is_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    model.train()
    ask(model, recovery="prior", num_subsets=8)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_size_of_a_large_cache_is_printed_first(model, monkeypatch, capsys, tmp_path):
    ask(model, show_progress=True, cache_dir=tmp_path / "small")
    assert "MiB of activations" not in capsys.readouterr().err
    monkeypatch.setattr(ActivationCache, "num_bytes", property(lambda cache: 2**31))
    ask(model, show_progress=True, cache_dir=tmp_path / "large")
    assert f"STRIDE stores 2048 MiB of activations in {tmp_path / 'large'}." in capsys.readouterr().err


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("ids", [[3], [2, 50, 3]])
def test_texts_that_cannot_be_read_are_named_first(model, tmp_path, cached, ids):
    """Before the model has run over those in front of them."""
    texts = [TRAIN[index] for index in range(len(TRAIN))]
    texts[11] = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    rows = []
    model.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(out)), with_kwargs=True)
    with pytest.raises(ValueError, match=r"^Training example 11 has (no token to predict|the label 50|3 tokens)"):
        ask(model, train=texts, **({"cache_dir": tmp_path} if cached else {}))
    assert sum(rows) <= 20


def test_recoveries_have_the_scale_of_the_closed_form(model):
    plain = ask(model).scores
    for degree in (4, 12):
        scores = ask(model, recovery="prior", num_subsets=24, degree=degree).scores
        ratio = float((scores * plain).sum() / plain.square().sum())
        assert 0.6 < ratio < 1.4, degree


def test_options_without_effect_are_refused(model):
    for option in ({"num_subsets": 8}, {"degree": 3}):
        with pytest.raises(ValueError, match=f"so {next(iter(option))} would have no effect"):
            ask(model, recovery="closed-form", **option)
