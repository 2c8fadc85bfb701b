"""Losses that couple the examples of a batch, and losses with random numbers."""

import warnings

import pytest
import torch

from stride_lightning.gradients import own_reader, planned
from stride_lightning.gradients.own_plan import NUM_DRAWS
from stride_lightning.runtime.row_draws import row_draws
from tests.helpers.gradient_models import close_scores, flat
from tests.helpers.own_losses import ask, built
from tests.helpers.own_losses_together import VAE, Contrastive, Diffusion, Dropped
from tests.helpers.own_weighted import ClassWeights
from tests.helpers.processes import run_two, start
from tests.helpers.tiny import correlation, permutation

random_kinds = pytest.mark.parametrize("cls", [VAE, Diffusion, Dropped], ids=lambda cls: cls.__name__)
#: The size of the loader's batches, in which a coupled loss is seen.
SIZE = 4


# ---- coupled ------------------------------------------------------------------------------------------------------


def of_rows(model, examples, row):
    """The batch size times what flows through one example of a batch."""
    batch = [torch.stack(parts) for parts in zip(*examples, strict=True)]
    with torch.enable_grad():
        return len(examples) * flat(model.gradient_of(batch, row), list(model.parameters()))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_coupled_loss_in_a_single_batch(batch_size):
    """The whole training set is one batch, so nothing is drawn; a query takes the place of the first example."""
    model, train, queries = built(Contrastive), Contrastive.data(SIZE, 0), Contrastive.data(5, 1)
    mine = torch.stack([of_rows(model, list(train), row) for row in range(SIZE)])
    theirs = torch.stack([of_rows(model, [query, *list(train)[1:]], 0) for query in queries])
    attribution = ask(model, train, queries, batch_size=batch_size)
    close_scores(attribution.scores, theirs @ mine.T)
    assert "(`measure=` explains a query by itself)" in attribution.metadata["loss"]


def fixed_batches(monkeypatch):
    """Note the batches in which a coupled loss sees examples: places in what is read, ``-1 - place`` for training."""
    seen = []
    original = own_reader.OwnReader._entries

    def entries(self, start, stop):
        for places, batches in original(self, start, stop):
            seen.append((self._are_queries, places, batches))
            yield places, batches

    monkeypatch.setattr(own_reader.OwnReader, "_entries", entries)
    return seen


def test_a_coupled_loss_in_fixed_batches(monkeypatch):
    model, train, queries = built(Contrastive), Contrastive.data(13, 0), Contrastive.data(3, 1)
    seen = fixed_batches(monkeypatch)
    scores = ask(model, train, queries).scores

    def mean_of(are_queries, place):
        rows = []
        for queried, places, batches in seen:
            counted = [places.start] if isinstance(places, slice) else places.tolist()
            if queried is are_queries and place in counted:
                for entries in batches:
                    assert len(set(entries)) == len(entries) == SIZE
                    examples = [train[-1 - e] if e < 0 else (queries if are_queries else train)[e] for e in entries]
                    rows.append(of_rows(model, examples, entries.index(place)))
                assert len({frozenset(entries) for entries in batches}) > 1  # with different others
        assert len(rows) == own_reader.NUM_BATCHES
        return torch.stack(rows).mean(0)

    mine = torch.stack([mean_of(False, place) for place in range(13)])
    theirs = torch.stack([mean_of(True, place) for place in range(3)])
    close_scores(scores, theirs @ mine.T)


@pytest.mark.parametrize("method", ["ekfac", "trak", "datainf", "diagonal"])
def test_a_coupled_loss_whatever_the_batch_size(method):
    model, train, queries = built(Contrastive), Contrastive.data(13, 0), Contrastive.data(3, 1)
    one, other = (ask(model, train, queries, method, batch_size=size, damping=0.1).scores for size in (3, 64))
    close_scores(one, other)


def test_the_top_of_a_coupled_loss_is_that_of_all_scores(monkeypatch):
    monkeypatch.setattr(planned, "TILE_BYTES", 4 * 3 * 5)
    model, train, queries = built(Contrastive), Contrastive.data(13, 0), Contrastive.data(3, 1)
    expected = ask(model, train, queries).scores.sort(descending=True).values
    close_scores(ask(model, train, queries, top_k=13).top(13).proponent_scores, expected)


# ---- random -------------------------------------------------------------------------------------------------------


def by_hand(model, examples, positions):
    """Gradients of the mean over draws of single examples' losses."""
    parameters, rows = list(model.parameters()), []
    for example, position in zip(examples, positions, strict=True):
        batch, total = [part[None] for part in example], 0.0
        with torch.enable_grad():
            for draw in range(NUM_DRAWS):
                with row_draws(torch.tensor([position]), draw):
                    total = total + model.training_step(batch, 0) / NUM_DRAWS
        rows.append(flat(torch.autograd.grad(total, parameters, allow_unused=True), parameters))
    return torch.stack(rows)


@random_kinds
def test_random_numbers_belong_to_examples(cls):
    model, train, queries = built(cls), cls.data(13, 0), cls.data(5, 1)
    mine, theirs = by_hand(model, train, range(13)), by_hand(model, queries, own_reader.QUERY_KEYS + torch.arange(5))
    for batch_size in (1, 7, 64):
        attribution = ask(model, train, queries, batch_size=batch_size)
        close_scores(attribution.scores, theirs @ mine.T)
        assert f"a mean over {NUM_DRAWS} draws" in attribution.metadata["loss"]


@random_kinds
def test_the_order_of_examples_changes_no_random_numbers(cls):
    model, train, queries, order = built(cls), cls.data(13, 0), cls.data(5, 1), permutation(13)
    expected = ask(model, train, queries).scores[:, order]
    close_scores(ask(model, train, queries, batch_size=5, train_indices=order).scores, expected)


@pytest.mark.parametrize("method", ["ekfac", "trak", "logra"])
def test_random_losses_whatever_the_batch_size(method):
    model, train, queries = built(Diffusion), Diffusion.data(13, 0), Diffusion.data(5, 1)
    scores = [ask(model, train, queries, method, batch_size=size, damping=0.1).scores for size in (1, 7)]
    close_scores(*scores)


def test_queries_share_no_random_numbers_with_training_examples():
    model, train = built(VAE), VAE.data(13, 0)
    scores = ask(model, train, train).scores
    assert correlation(scores, scores.T) < 0.999


def on_each(number, port, folder):
    warnings.simplefilter("ignore")
    start(number, port, group=True)
    torch.save(everything(), folder / f"rank{number}.pt")


def everything():
    results = {}
    for cls in (VAE, Diffusion, Contrastive, ClassWeights):
        model, train, queries = built(cls), cls.data(13, 0), cls.data(5, 1)
        for method in ("grad-dot", "ekfac") if cls in (Contrastive, ClassWeights) else ("grad-dot",):
            options = {} if method == "grad-dot" else {"damping": 0.1}
            results[cls.__name__, method] = ask(model, train, queries, method, batch_size=3, **options).scores
    return results


@pytest.mark.distributed
def test_two_processes(tmp_path):
    first, second = run_two(on_each, tmp_path)
    for key, expected in everything().items():
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
        close_scores(first[key], expected)
