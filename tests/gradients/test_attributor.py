"""What must change nothing: batches, order, chunks, tiles, processes, precision; and the caller's model."""

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning import Classification
from stride_lightning.attribute import self_influence
from stride_lightning.gradients import planned, signs
from tests.helpers.gradient_models import (
    EXACT,
    QUIET,
    TASKS,
    Everything,
    TokenModel,
    attributed,
    check_same_condition,
    close_scores,
    condition_of,
    fitted,
    mlp,
    points_for,
    save_weights,
    seeded,
    targets_for,
    words_for,
)
from tests.helpers.processes import run_two, start
from tests.helpers.tiny import permutation

pytestmark = [
    #: Torch's own, of the first forward-mode derivatives.
    pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LiSSA ended with residuals"),
]
DATA, QUERIES = points_for(num=13), points_for(num=5, seed=1)
every_method = pytest.mark.parametrize("method", EXACT)


def options_of(method, **more):
    return QUIET | EXACT[method] | more


def ask(method, model=None, data=DATA, queries=QUERIES, **more):
    return attributed(mlp() if model is None else model, data, method, queries, **more)


# ---- invariance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grad-dot", "datainf", "ekfac", "logra", "trak"])
@pytest.mark.parametrize("many", [False, True])
def test_batch_size_of_tokens(method, many, monkeypatch):
    """Of several places, with all outputs or random directions of them."""
    if many:
        monkeypatch.setattr(signs, "MAX_EXACT_OUTPUTS", 2)
    model, data = seeded(TokenModel), words_for(13)
    full, parts = (ask(method, model, data, data, batch_size=size).scores for size in (13, 4))
    close_scores(parts, full)


@every_method
def test_queries_in_chunks(method):
    """Two at a time: also those of conjugate gradients, which are solved to a tolerance together."""
    full = ask(method).scores
    has_self_influence = method != "grad-cos"  # which has no self-influence
    influence = (
        self_influence(mlp(), train_data=DATA, method=method, **options_of(method)) if has_self_influence else None
    )
    size = (
        4 * 2 * (8 if "influence" in method or method == "last-layer" else 2) * (18 if method == "last-layer" else 43)
    )
    attributor = fitted(mlp(), DATA, method, memory_budget=2 * size, **options_of(method))
    projected = method in ("logra", "trak", "trak-newton")
    assert [c.stop - c.start for c in attributor._query_chunks(5)] == ([5] if projected else [2, 2, 1])
    close_scores(attributor.attribute(QUERIES).scores, full)
    if influence is not None:
        close_scores(attributor.self_influence(), influence)


@every_method
def test_batches_fit_a_memory_budget(method):
    """Fewer examples at once where they must be, and the same scores; one at least."""
    attributor = fitted(mlp(), DATA, method, memory_budget=1, **options_of(method))
    assert attributor.chunk_size == 1
    close_scores(attributor.attribute(QUERIES).scores, ask(method).scores)


def test_budgets_are_halved_between_batches_and_queries():
    free = fitted(mlp(), DATA, "grad-dot")
    assert free.batch_bytes == free.query_bytes == 2**28
    each = free.effort.num_bytes
    attributor = fitted(mlp(), DATA, "grad-dot", memory_budget=2 * 3 * each)
    assert (attributor.chunk_size, free.chunk_size) == (3, 256)
    assert fitted(mlp(), DATA, "influence-cg", memory_budget=2 * 4 * each).chunk_size == 2  # which holds two graphs


@every_method
def test_seed(method):
    """Where nothing is random it changes nothing."""
    close_scores(ask(method, seed=3).scores, ask(method, seed=4).scores, 1e-4)


@every_method
def test_bfloat16(method):
    options = {"damping": 3.0} if "damping" in EXACT[method] else {}
    options |= {"tolerance": 1e-2} if "tolerance" in EXACT[method] else {}
    scores = ask(method, model=mlp().bfloat16(), **options).scores
    close_scores(scores, ask(method, **options).scores, 0.15)


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "influence-cg", "trak"])
@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_outputs_without_an_axis(method, kind):
    """``(B,)`` in place of ``(B, 1)``."""
    model, data = mlp(num_outputs=1), points_for(kind)
    flat = TensorDataset(data.tensors[0], data.tensors[1].flatten())
    scores = ask(method, nn.Sequential(*model, nn.Flatten(0)), flat, flat, task=TASKS[kind][0]).scores
    close_scores(scores, ask(method, model, data, data, task=TASKS[kind][0]).scores)


@pytest.mark.parametrize("method", ["ekfac", "influence-cg"])
def test_compiled_models(method):
    close_scores(ask(method, torch.compile(mlp(), backend="aot_eager")).scores, ask(method).scores)


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "influence-cg", "logra", "trak"])
def test_chosen_layers(method):
    """The same as freezing the others."""
    frozen = mlp()
    frozen[0].requires_grad_(False)
    close_scores(ask(method, layers=["2"]).scores, ask(method, frozen).scores)
    assert (ask(method).scores - ask(method, frozen).scores).abs().max() > 1e-3


# ---- the top alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ekfac", "datainf", "trak"])
def test_top_k_over_checkpoints_in_tiles_and_chunks(method, monkeypatch, tmp_path):
    full = ask(method, checkpoints=save_weights(tmp_path)).top(13)
    monkeypatch.setattr(planned, "TILE_BYTES", 4 * 2 * 3)
    top = ask(method, checkpoints=tmp_path, top_k=20, memory_budget=2 * 4 * 2 * 2 * 43).top(13)
    assert torch.equal(top.proponents, full.proponents)
    close_scores(top.opponent_scores, full.opponent_scores)


# ---- self-influence ---------------------------------------------------------------------------------------------


def test_the_cosine_of_an_example_with_itself_says_nothing():
    with pytest.raises(ValueError, match="with itself is always 1"):
        self_influence(mlp(), train_data=DATA, method="grad-cos", **QUIET)


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "trak"])
def test_self_influence_over_checkpoints(method, tmp_path):
    expected = ask(method, queries=DATA, checkpoints=save_weights(tmp_path)).scores.diagonal()
    options = options_of(method, checkpoints=tmp_path, batch_size=4)
    close_scores(self_influence(mlp(), train_data=DATA, method=method, **options), expected)


# ---- the caller's model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "trak"])
def test_model_is_as_before_when_something_fails(method):
    class Failing(Classification):
        def curvature_root(self, mean, direction):
            raise RuntimeError("out of luck")

        margin = loss = curvature_root

    model = seeded(Everything).train()
    before = condition_of(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        ask(method, model, task=Failing())
    check_same_condition(before, model)


def test_weight_norm_of_the_old_kind_is_as_before():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
        before = model[0].weight.detach().clone()
        ask("grad-dot", model)
    assert torch.equal(model[0].weight.detach(), before)


@pytest.mark.parametrize("kind", [{"sparse": True}, {"scale_grad_by_freq": True}], ids=lambda kind: next(iter(kind)))
def test_embeddings_with_gradients_of_another_kind(kind):
    """Sparse gradients are the same numbers; so are those by frequency where no word comes twice."""
    words = torch.stack([permutation(11).roll(i)[:3] for i in range(13)])
    data = TensorDataset(words, targets_for(Classification(), 3, 13, 0))

    def scores(options):
        model = seeded(lambda: nn.Sequential(nn.Embedding(11, 4, **options), nn.Flatten(), nn.Linear(12, 3)))
        return ask("grad-dot", model, data, data).scores

    close_scores(scores(kind), scores({}))


def test_metadata():
    metadata = ask("trak", layers=["2"]).metadata
    assert metadata["options"] == {"layers": ["2"], "top_k": None, "damping": 0.3, "residuals": "model"}
    assert metadata["gradients"] == {"num_parameters": 18, "blocks": {"factors": 1}}


# ---- two processes ----------------------------------------------------------------------------------------------


def on_each(number, port, folder):
    start(number, port, group=True)
    torch.save(everything(), folder / f"rank{number}.pt")


def everything():
    """Scores of data where random directions are drawn, and tops over checkpoints in tiles."""
    warnings.simplefilter("ignore")
    results, words = {}, words_for(13)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(signs, "MAX_EXACT_OUTPUTS", 2)
        for method in ("ekfac", "logra"):
            results[method, "many outputs"] = ask(method, seeded(TokenModel), words, words, batch_size=3).scores
        patch.undo()
        patch.setattr(planned, "TILE_BYTES", 4 * 5 * 6)  # two tiles of the 7 examples of rank 0, one of the 6 of rank 1
        save_weights(Path(folder))
        for method in ("datainf", "influence-cg", "trak"):
            results[method, "checkpoints"] = ask(method, top_k=13, checkpoints=folder).top(13).proponent_scores
    return results


@pytest.mark.distributed
def test_two_processes(tmp_path):
    first, second = run_two(on_each, tmp_path)
    with warnings.catch_warnings():
        alone = everything()
    for key, expected in alone.items():
        assert first[key].equal(second[key]), key
        close_scores(first[key], expected)
