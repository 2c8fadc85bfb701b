"""Gradient methods on language models, against gradients of the loss of one text after the other, without padding."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from stride_lightning import CausalLanguageModeling
from stride_lightning.attribute import create
from stride_lightning.gradients import features, signs
from stride_lightning.runtime.hashed_numbers import scrambled
from tests.helpers.gradient_models import EXACT, QUIET, attributed, close_scores, inverse_of
from tests.helpers.language_models import (
    IGNORED,
    VOCABULARY,
    Texts,
    bert,
    gauss_newton_by_hand,
    gpt2,
    gradients_by_hand,
    left_padded,
    llama,
    loader,
    packed,
    padded,
    plain_gpt,
    texts,
    trainable,
    widely_padded,
)

#: Torch's own, of the first forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")

MODELS = {"GPT-2": gpt2, "Llama": llama, "plain": plain_gpt}
#: Up to four tokens that count, so that their seven logits are summed over; more are too many.
SHORT, QUERIES = texts(7), texts(3, seed=1)
LONG = texts(7, shortest=5, longest=9)


@cache
def model_of(kind):
    return MODELS[kind]()


@cache
def gradients_of(kind, data, layers=None):
    return gradients_by_hand(model_of(kind), data, layers)


@cache
def gauss_newton_of(kind, data, layers=None):
    return gauss_newton_by_hand(model_of(kind), data, layers)


def task_of(kind):
    return CausalLanguageModeling() if kind == "plain" else None


def scores_of(kind, method, data=SHORT, queries=QUERIES, collate_fn=padded, **options):
    options = {"batch_size": 4, "task": task_of(kind)} | options
    return attributed(model_of(kind), loader(data, collate_fn), method, loader(queries, collate_fn), **options)


def places_of_blocks(attributor, model):
    """Places in a vector of all parameters, block by block."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    ends = dict(zip(sizes, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True))
    return [torch.cat([ends[name] for name in layout.parameters]) for layout in attributor.capture.layouts.values()]


def fitted(kind, method, data=SHORT, collate_fn=padded, **options):
    attributor = create(method, **{**QUIET, "batch_size": 4, **EXACT[method], **options})
    return attributor.fit(model_of(kind), loader(data, collate_fn), task_of(kind))


# ---- against brute force ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["grad-dot", "grad-cos", "diagonal", "influence-cg", "influence-lissa"])
def test_scores_by_hand(method, kind):
    attribution = scores_of(kind, method)
    theirs, mine = gradients_of(kind, SHORT), gradients_of(kind, QUERIES)
    if method == "grad-dot":
        expected = mine @ theirs.T
    elif method == "grad-cos":
        expected = F.normalize(mine, dim=1) @ F.normalize(theirs, dim=1).T
    elif method == "diagonal":
        squares = theirs.square().mean(0)
        expected = mine / (squares + EXACT[method]["damping"] * squares.mean()) @ theirs.T / len(SHORT)
    else:
        matrix, described = gauss_newton_of(kind, SHORT), attribution.metadata["curvature"][0]
        assert described["mean_eigenvalue"] == pytest.approx(float(matrix.trace()) / len(SHORT))
        expected = mine @ inverse_of(matrix, described["damping"]) @ theirs.T / len(SHORT)
    close_scores(attribution.scores, expected, 1e-4 if method == "influence-lissa" else 1e-5)


@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
@pytest.mark.parametrize("method", ["datainf", "logra"])
def test_scores_block_by_block_by_hand(method, kind):
    attributor = fitted(kind, method)
    attribution = attributor.attribute(loader(QUERIES, padded))
    theirs, mine, described = (
        gradients_of(kind, SHORT),
        gradients_of(kind, QUERIES),
        attribution.metadata["curvature"][0],
    )
    expected = 0
    for at in places_of_blocks(attributor, model_of(kind)):
        rows = theirs[:, at]
        if method == "datainf":
            damping = EXACT[method]["damping"] * rows.square().mean()
            inverse = sum(inverse_of(torch.outer(row, row), damping) for row in rows) / len(rows)
        else:
            inverse = inverse_of(gauss_newton_of(kind, SHORT)[at][:, at], described["damping"])
        expected = expected + mine[:, at] @ inverse @ rows.T
    close_scores(attribution.scores, expected / len(SHORT))


@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_last_layer_by_hand(kind):
    # GPT-2's head is its table of embeddings, so that both parts of its gradient count; it is Llama's own.
    name = "transformer.wte" if kind == "GPT-2" else "lm_head"
    attribution = scores_of(kind, "last-layer", **({"layers": ["lm_head"]} if kind == "GPT-2" else {}))
    theirs, mine, matrix = (
        function(kind, *data, (name,))
        for function, data in ((gradients_of, [SHORT]), (gradients_of, [QUERIES]), (gauss_newton_of, [SHORT]))
    )
    inverse = inverse_of(matrix, attribution.metadata["curvature"][0]["damping"])
    close_scores(attribution.scores, mine @ inverse @ theirs.T / len(SHORT))


def residuals_by_hand(kind, data):
    """Minus the derivative of each loss in the logits, flattened, and the second derivative along it."""
    sizes, curved = [], []
    for example in data:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        model = model_of(kind)
        with torch.no_grad():
            logits = (model(ids) if kind == "plain" else model(ids).logits)[0, :-1][labels != IGNORED]
        labels, p = labels[labels != IGNORED], logits.softmax(-1)
        residual = (F.one_hot(labels, VOCABULARY) - p) / len(labels)
        unit = residual / residual.norm()
        sizes.append(residual.norm())
        curved.append(((p * unit.square()).sum(-1) - (p * unit).sum(-1).square()).sum() / len(labels))
    return torch.stack(sizes), torch.stack(curved)


@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
@pytest.mark.parametrize("method", ["trak", "trak-newton"])
def test_trak_by_hand(method, kind):
    (sizes, curved), (query_sizes, _) = (residuals_by_hand(kind, data) for data in (SHORT, QUERIES))
    theirs, mine = -gradients_of(kind, SHORT) / sizes[:, None], -gradients_of(kind, QUERIES) / query_sizes[:, None]
    weights = curved if method == "trak-newton" else torch.ones_like(curved)
    kernel = theirs.T @ (weights[:, None] * theirs) / len(SHORT)
    damping = EXACT[method]["damping"] * kernel.trace() / len(SHORT)
    expected = mine @ inverse_of(kernel, damping) @ theirs.T * sizes / len(SHORT)
    close_scores(scores_of(kind, method).scores, expected)


def test_ekfac_has_the_trace_of_the_matrix():
    described = scores_of("Llama", "ekfac").metadata["curvature"][0]
    matrix = gauss_newton_of("Llama", SHORT)
    assert described["mean_eigenvalue"] == pytest.approx(float(matrix.trace()) / len(matrix))


def test_tracin_by_hand(tmp_path):
    expected, rates = 0, (0.3, 0.1)
    for step, rate in enumerate(rates):
        model = gpt2(seed=step)
        states = [torch.optim.SGD(model.parameters(), lr=rate).state_dict()]
        content = {"state_dict": model.state_dict(), "global_step": step, "optimizer_states": states}
        torch.save(content, tmp_path / f"{step}.ckpt")
        theirs, mine = (gradients_by_hand(model, data) for data in (SHORT, QUERIES))
        expected = expected + rate * mine @ theirs.T
    attribution = attributed(gpt2(seed=1), loader(SHORT), "tracin", loader(QUERIES), record=tmp_path, batch_size=4)
    close_scores(attribution.scores, expected)


def test_sums_and_weights_by_hand():
    weighted = Texts([{**one, "loss_weights": [0.5 * (i + 1) for i in range(len(one["labels"]))]} for one in SHORT])
    for reduction in ("mean", "sum"):
        task = CausalLanguageModeling(reduction)
        attribution = attributed(model_of("Llama"), loader(weighted), "grad-dot", task=task, batch_size=4)
        rows = gradients_by_hand(model_of("Llama"), weighted, reduction=reduction)
        close_scores(attribution.scores, rows @ rows.T)


# ---- padding and batches ----------------------------------------------------------------------------------------

METHODS = ["grad-dot", "diagonal", "datainf", "ekfac", "last-layer", "logra", "trak", "trak-newton"]


@pytest.mark.parametrize("data", [SHORT, LONG], ids=["all logits", "random directions"])
@pytest.mark.parametrize("method", METHODS)
def test_neither_padding_nor_the_batch_matters(method, data):
    # Sketches too: they are made of parameters, not of tokens.
    options = {"projection_dim": 16 if method.startswith("trak") else 3} if method in METHODS[-3:] else {}
    expected = scores_of("Llama", method, data, batch_size=1, **options).scores
    ways = [(3, padded), (4, packed), (7, widely_padded), (5, left_padded)]
    if method != "grad-dot":  # whose gradients all methods have
        ways = ways[:2] if data is SHORT else ways[2:]
    for batch_size, collate_fn in ways:
        scores = scores_of("Llama", method, data, collate_fn=collate_fn, batch_size=batch_size, **options).scores
        # Llama's rotations of positions are in single precision, and padding on the left moves them; of a matrix of
        # low rank that decides which eigenvectors EK-FAC has.
        is_rounded = collate_fn is left_padded and method == "ekfac"
        close_scores(scores, expected, 1e-2 if is_rounded else 2e-6)


def test_neither_padding_nor_the_batch_matters_to_conjugate_gradients():
    # The trace that the damping is relative to, and the preconditioner, are of random directions here.
    expected = scores_of("GPT-2", "influence-cg", LONG, batch_size=1).scores
    for batch_size, collate_fn in ((3, padded), (4, packed)):
        scores = scores_of("GPT-2", "influence-cg", LONG, collate_fn=collate_fn, batch_size=batch_size).scores
        close_scores(scores, expected, 2e-6)


def test_data_that_is_not_held_may_be_cut_anywhere(monkeypatch):
    # Tiles begin in the middle of a batch, whose texts are then padded to another length, on the left.
    whole = scores_of("Llama", "grad-dot", LONG, batch_size=1).scores
    monkeypatch.setattr(features, "HELD_BYTES", 0)
    monkeypatch.setattr("stride_lightning.gradients.planned.TILE_BYTES", 4 * len(QUERIES) * 2)
    top = scores_of("Llama", "grad-dot", LONG, batch_size=4, collate_fn=left_padded, top_k=4)
    close_scores(top.top(4).proponent_scores, whole.sort(1, descending=True).values[:, :4])


def curvature_rows(kind, data, collate_fn, batch_size, seed=0):
    """Gradients along the directions that curvature is made of, shape ``(directions, n, p)``."""
    attributor = fitted(kind, "grad-dot", data, collate_fn, batch_size=batch_size)
    with torch.no_grad():
        batches = attributor.reader.run()
        rows = [torch.stack([gradients.dense() for gradients in batch.curvature(seed)]) for batch in batches]
    assert batch_size > 1 or len(rows) == len(data)
    return rows


def test_random_directions_of_a_text_are_its_own():
    one_by_one = torch.cat(curvature_rows("Llama", LONG, padded, 1), 1)
    assert len(one_by_one) == signs.NUM_DIRECTIONS
    for collate_fn, batch_size, tolerance in ((padded, 3, 1e-9), (widely_padded, 4, 1e-9), (left_padded, 9, 1e-5)):
        rows = torch.cat(curvature_rows("Llama", LONG, collate_fn, batch_size), 1)
        torch.testing.assert_close(rows, one_by_one, rtol=0, atol=tolerance)
    others = torch.cat(curvature_rows("Llama", LONG, padded, 9, seed=1), 1)
    assert not torch.allclose(others, one_by_one, atol=1e-2)


def test_random_directions_give_the_matrix_on_average():
    attributor, exact = fitted("Llama", "grad-dot", LONG), gauss_newton_of("Llama", LONG)
    drawn = []
    order = torch.cat(places_of_blocks(attributor, model_of("Llama")))
    for seed in range(25):
        with torch.no_grad():
            batches = attributor.reader.run()
            rows = torch.cat([gradients.dense() for batch in batches for gradients in batch.curvature(seed)])
        drawn.append(rows.T @ rows / len(LONG))
    drawn, exact = torch.stack(drawn), exact[order][:, order]
    error = float((drawn.std(0) / len(drawn) ** 0.5).norm())
    assert error < 0.2 * float(exact.norm())
    assert float((drawn.mean(0) - exact).norm()) < 1.5 * error


def test_random_directions_differ_between_tokens():
    drawn = signs.random_signs(scrambled(torch.tensor(5)) + torch.arange(6), 0, 40, 0, torch.ones(1))
    assert (drawn @ drawn.T / 40 - torch.eye(6)).abs().max() < 0.6


# ---- texts with a class -----------------------------------------------------------------------------------------


def reviews(num=7, seed=0):
    generator = torch.Generator().manual_seed(seed + 9)
    labels = torch.randint(3, (num,), generator=generator).tolist()
    pairs = zip(texts(num, seed), labels, strict=True)
    return Texts([{"input_ids": one["input_ids"], "label": label} for one, label in pairs])


def padded_reviews(examples, length=None):
    batch = padded([{"input_ids": one["input_ids"]} for one in examples], length=length, fill=2)
    return {**batch, "labels": torch.tensor([one["label"] for one in examples])}


def widely_padded_reviews(examples):
    return padded_reviews(examples, length=9)


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "trak"])
def test_classes_of_texts(method):
    model, data, queries = bert(), reviews(), reviews(3, seed=1)

    def scores(collate_fn, batch_size):
        train_loader, query_loader = loader(data, collate_fn), loader(queries, collate_fn)
        return attributed(model, train_loader, method, query_loader, batch_size=batch_size).scores

    actual = scores(padded_reviews, 3)
    if method == "grad-dot":
        rows = []
        for one in (*queries, *data):
            with torch.enable_grad():
                logits = model(input_ids=torch.tensor([one["input_ids"]])).logits
                loss = F.cross_entropy(logits, torch.tensor([one["label"]]))
                grads = torch.autograd.grad(loss, [*trainable(model).values()], allow_unused=True)
            rows.append(torch.cat([g.flatten() for g in grads if g is not None]))
        rows = torch.stack(rows)
        close_scores(actual, rows[:3] @ rows[3:].T)
    for collate_fn, batch_size in ((padded_reviews, 1), (widely_padded_reviews, 4)):
        close_scores(scores(collate_fn, batch_size), actual, 1e-5)


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["information-loss", "information-gain"])
def test_information_is_not_of_sequences(method):
    with pytest.raises(ValueError, match=r"one prediction per example.*Use method='ekfac'"):
        attributed(gpt2(), loader(SHORT), method, loader(QUERIES))
