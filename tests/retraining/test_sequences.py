"""Retraining and further training of language models, against plain loops over texts without padding."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from stride_lightning import (
    CausalLanguageModeling,
    attribute,
    further_train,
    retrain,
    retrain_without,
    self_influence,
    tune_damping,
)
from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import survey
from stride_lightning.retraining.batchability import mixed_places
from stride_lightning.retraining.batches import batch_order
from tests.helpers import language_models
from tests.helpers.gradient_models import QUIET, close_scores
from tests.helpers.language_models import IGNORED, Texts, Wrapped, gpt2, loader, loss_by_hand, padded, texts

DATA, QUERIES = texts(8), texts(3, seed=1)
#: All of one length and without prompts: the mean over all tokens of a batch is the mean over its texts.
EVEN, EVEN_QUERIES = (texts(num, seed, shortest=4, longest=4, prompt=False) for num, seed in ((8, 0), (3, 1)))
EPOCHS, BATCH_SIZE, RATE = 2, 4, 0.2
SGD = partial(torch.optim.SGD, lr=RATE)
#: With weights of the seed that is set.
fresh_gpt2, fresh_llama = partial(gpt2, seed=None), partial(language_models.llama, seed=None)
fresh_plain, fresh_bert = partial(language_models.plain_gpt, seed=None), partial(language_models.bert, seed=None)
PADDINGS = (padded, language_models.widely_padded, language_models.packed)
MODELS = {"GPT-2": fresh_gpt2, "Llama": fresh_llama, "plain": fresh_plain}
MASKS = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 1, 1]]).bool()
HOW = {"max_epochs": EPOCHS, "num_seeds": 1, "show_progress": False}


def task_of(kind):
    return CausalLanguageModeling() if kind == "plain" else None


def close(result, expected, tolerance=1e-6):
    torch.testing.assert_close(result.double(), expected.double(), rtol=0, atol=tolerance)


def mean_over_texts(model, batch):
    return torch.stack([loss_by_hand(model, one) for one in batch]).mean()


def mean_over_tokens(model, batch):
    """What transformers computes of a batch."""
    losses = []
    for one in batch:
        labels = torch.tensor(one["labels"])[1:]
        logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0, :-1]
        losses.append(F.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED], reduction="none"))
    return torch.cat(losses).mean()


@torch.enable_grad()
def trained(make, data, mask, loss):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    optimizer = SGD(model.parameters())
    for epoch in range(EPOCHS):
        for batch in batch_order(len(data), BATCH_SIZE, False, False, 0, epoch):
            members = [data[place] for place in batch.tolist() if mask[place]]
            if members:
                optimizer.zero_grad()
                loss(model, members).backward()
                optimizer.step()
    return model


@torch.no_grad()
def losses_by_hand(model, queries):
    return torch.stack([loss_by_hand(model, one) for one in queries])


def truth_by_hand(make, data=DATA, queries=QUERIES, loss=mean_over_texts):
    return torch.stack([losses_by_hand(trained(make, data, mask, loss), queries) for mask in MASKS])


def retrained(make, data=DATA, queries=QUERIES, collate_fn=padded, optimizer=SGD, **options):
    how = {"train_data": loader(data, collate_fn, BATCH_SIZE), "masks": MASKS, "optimizer": optimizer, **HOW, **options}
    return retrain(make, loader(queries, collate_fn), **how)


# ---- retraining -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_models_train_together_as_in_a_plain_loop(kind):
    expected = truth_by_hand(MODELS[kind])
    for collate_fn in PADDINGS:
        truth = retrained(MODELS[kind], collate_fn=collate_fn, task=task_of(kind))
        assert truth.metadata["one_by_one_because"] is None
        close(truth.losses, expected)
    assert (expected[0] - expected[1]).abs().min() > 1e-3


def test_one_by_one_is_the_same():
    truth = retrained(fresh_gpt2, one_by_one=True)
    assert truth.metadata["one_by_one_because"] == "one_by_one=True was given"
    close(truth.losses, truth_by_hand(fresh_gpt2))


def test_a_module_whose_loss_is_that_of_transformers():
    # Texts of one length: its loss is the task's.
    expected = truth_by_hand(fresh_gpt2, EVEN, EVEN_QUERIES)
    for collate_fn in (padded, language_models.encoded):
        truth = retrained(lambda: Wrapped(fresh_gpt2(), RATE), EVEN, EVEN_QUERIES, collate_fn, optimizer=None)
        assert truth.metadata["one_by_one_because"] is None
        close(truth.losses, expected)


def test_a_mean_over_all_tokens_is_found_out():
    truth = retrained(lambda: Wrapped(fresh_gpt2(), RATE), optimizer=None)
    assert "a mean over all tokens of the batch" in truth.metadata["one_by_one_because"]
    # A text counts by its tokens, relative to the mean of the training set.
    counts = [[sum(label != IGNORED for label in one["labels"][1:]) for one in texts] for texts in (QUERIES, DATA)]
    weights = torch.tensor(counts[0]) / torch.tensor(counts[1]).double().mean()
    close(truth.losses, weights * truth_by_hand(fresh_gpt2, loss=mean_over_tokens), 1e-5)
    assert (truth.losses - truth_by_hand(fresh_gpt2)).abs().max() > 1e-3  # which is another training


def test_one_text_of_another_length_is_enough():
    one = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    for place in range(8):
        data = Texts([*EVEN.examples[:place], one, *EVEN.examples[place + 1 :]])
        how = {"train_data": loader(data, padded, 2), "masks": MASKS[:2], **HOW, "max_epochs": 1}
        truth = retrain(lambda: Wrapped(fresh_gpt2(), RATE), loader(EVEN_QUERIES), **how)
        assert "a mean over all tokens of the batch" in truth.metadata["one_by_one_because"]


def test_kinds_of_texts():
    result = survey(Examples(DATA, padded), CausalLanguageModeling())
    counts = [sum(label != IGNORED for label in one["labels"][1:]) for one in DATA]
    assert result.targets is None
    assert result.kinds.tolist() == counts
    kinds = torch.tensor([4.0] * 50 + [3.0])
    assert 50 in mixed_places(kinds, 51, size=4)


def test_the_fingerprint_does_not_depend_on_padding():
    task = CausalLanguageModeling()
    result = [survey(Examples(DATA, collate_fn), task).fingerprint for collate_fn in PADDINGS]
    for batch_size in (1, 3, 8):
        options = {"method": "grad-dot", "batch_size": batch_size, **QUIET}
        result.append(attribute(gpt2(), loader(QUERIES), train_data=loader(DATA), **options).metadata["data"])
    assert all(one == result[0] for one in result)
    other = Texts([{**DATA[0], "labels": [IGNORED, IGNORED, *DATA[0]["labels"][2:]]}, *DATA.examples[1:]])
    assert survey(Examples(other, padded), task).fingerprint != result[0]


def test_texts_without_what_an_attribution_calls_helpful():
    options = {"method": "grad-dot", "batch_size": 3, **QUIET}
    attribution = attribute(gpt2(), loader(QUERIES), train_data=loader(DATA), **options)
    how = {"train_data": loader(DATA, padded, BATCH_SIZE), "optimizer": SGD, **HOW}
    result = retrain_without(attribution, fresh_gpt2, loader(QUERIES), ks=[2], **how)
    for query, best in enumerate(attribution.top(2).proponents):
        mask = torch.ones(len(DATA), dtype=torch.bool).index_fill(0, best, False)
        model = trained(fresh_gpt2, DATA, mask, mean_over_texts)
        close(result.losses_removed[0, query], losses_by_hand(model, QUERIES)[query])


def test_tuning_the_damping():
    truth = retrained(fresh_gpt2, DATA, QUERIES)
    result = tune_damping(gpt2(), loader(QUERIES), train_data=loader(DATA), truth=truth, method="diagonal", **QUIET)
    assert result.best in result.dampings


def test_classes_of_texts_train_together():
    def collate(examples):
        batch = padded([{"input_ids": one["input_ids"]} for one in examples], fill=2)
        return {**batch, "labels": torch.tensor([one["input_ids"][0] % 3 for one in examples])}

    def loss(model, batch):
        logits = torch.cat([model(input_ids=torch.tensor([one["input_ids"]])).logits for one in batch])
        return F.cross_entropy(logits, torch.tensor([one["input_ids"][0] % 3 for one in batch]))

    truth = retrained(fresh_bert, collate_fn=collate)
    assert truth.metadata["one_by_one_because"] is None
    for mask, losses in zip(MASKS, truth.losses, strict=True):
        model = trained(fresh_bert, DATA, mask, loss)
        with torch.no_grad():
            close(losses, torch.stack([loss(model, [one]) for one in QUERIES]))


# ---- further training -------------------------------------------------------------------------------------------


def effects_by_hand(model, data, queries, left_out, seeds):
    """Loss without an example minus loss with it, its share of the loss taken from every batch."""
    result = []
    for seed in seeds:
        after = []
        for place in (None, *left_out):
            copy = model()
            optimizer = SGD(copy.parameters())
            for batch in batch_order(len(data), BATCH_SIZE, False, False, seed, 0):
                optimizer.zero_grad()
                loss = mean_over_texts(copy, [data[i] for i in batch.tolist()])
                if place is not None:
                    loss = loss - loss_by_hand(copy, data[place]) / len(data)
                loss.backward()
                optimizer.step()
            after.append(losses_by_hand(copy, queries))
        result.append(torch.stack([one - after[0] for one in after[1:]]))
    return torch.stack(result).mean(0).T


def unmasked(examples):
    batch = padded(examples)
    del batch["attention_mask"]
    return batch


@pytest.mark.parametrize("kind", ["masked", "no mask", "plain"])
def test_further_training(kind):
    collate_fn = unmasked if kind == "no mask" else padded
    make = language_models.plain_gpt if kind == "plain" else gpt2
    how = {"left_out": [1, 6], "num_seeds": 2, "optimizer": SGD, "task": task_of(kind), **QUIET}
    result = further_train(make(), loader(QUERIES), train_data=loader(DATA, collate_fn, BATCH_SIZE), **how)
    reason = result.metadata["one_by_one_because"]
    if kind == "masked":  # transformers decides by the numbers in the mask how to attend
        assert reason.startswith("torch.func cannot vectorise single examples: ")
        assert "Batches without attention_mask" in reason
        assert len(reason) < 300
    else:
        assert reason is None
    close(result.effects(), effects_by_hand(make, DATA, QUERIES, [1, 6], [0, 1]), 1e-7)


def test_further_training_on_a_mean_over_all_tokens():
    options = {"left_out": [1], "num_seeds": 1, **QUIET}
    every = further_train(Wrapped(lr=RATE), loader(QUERIES), train_data=loader(DATA, padded, BATCH_SIZE), **options)
    assert every.effects().abs().max() > 0
    even = further_train(Wrapped(lr=RATE), loader(QUERIES), train_data=loader(EVEN, padded, BATCH_SIZE), **options)
    close(even.effects(), effects_by_hand(gpt2, EVEN, QUERIES, [1], [0]), 1e-7)


@pytest.mark.parametrize("method", ["further-training", "retraining"])
def test_attributors(method):
    options = {"optimizer": SGD, "train_batch_size": BATCH_SIZE, **QUIET}
    if method == "retraining":
        options |= {"model_fn": partial(fresh_gpt2, dtype=torch.float32), "max_epochs": 1, "num_subsets": 4}
    else:
        options |= {"num_seeds": 1}
    model = gpt2(dtype=torch.float32)
    result = attribute(model, loader(DATA), train_data=loader(DATA), method=method, **options)
    assert (result.train_targets, result.query_targets) == (None, None)
    diagonal = self_influence(model, train_data=loader(DATA), method=method, **options)
    close_scores(diagonal, result.scores.diag(), 1e-4)
    if method == "further-training":
        with pytest.raises(ValueError, match="Let the model generate"):
            attribute(gpt2(), loader(DATA), train_data=loader(DATA), method=method, target="predicted", **options)


# ---- what is refused --------------------------------------------------------------------------------------------


def with_one(position, **values):
    examples = list(texts(75))  # the first 64 decide about the task
    examples[position] = {**examples[position], **values}
    return loader(Texts(examples), padded, 5)


BAD = {
    "an unknown id": ({"input_ids": [1, 9, 2], "labels": [1, -100, 2]}, "has the token id 9"),
    "a long text": ({"input_ids": [1] * 15, "labels": [1] * 15}, "has 15 tokens"),
    "no text": ({"input_ids": [], "labels": []}, "has no tokens"),
    "nothing predicted": ({"input_ids": [3, 4, 5], "labels": [IGNORED] * 3}, "has no token to predict"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("place", [17, 70])
def test_bad_texts_are_named(kind, place):
    values, message = BAD[kind]
    good, bad = loader(DATA, padded, 4), with_one(place, **values)
    for train, queries, what in ((bad, good, "Training example"), (good, bad, "Query")):
        with pytest.raises(ValueError, match=f"^{what} {place} {message}"):
            retrain(fresh_gpt2, queries, train_data=train, optimizer=SGD, num_subsets=2, **HOW)
        with pytest.raises(ValueError, match=f"^{what} {place} {message}"):
            further_train(gpt2(), queries, train_data=train, optimizer=SGD, left_out=[1], num_seeds=1, **QUIET)


@pytest.mark.parametrize("kind", BAD)
def test_bad_texts_are_named_before_a_trainer_reads_them(kind):
    values, message = BAD[kind]
    how = {"train_data": with_one(70, **values), "num_subsets": 2, "one_by_one": True, **HOW}
    with pytest.raises(ValueError, match=f"^Training example 70 {message}"):
        retrain(lambda: Wrapped(fresh_gpt2()), loader(DATA), **how)
