"""Tasks of language models: their losses, what they read of batches and models, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import CausalLanguageModeling, Classification, SequenceClassification, self_influence
from stride_lightning.runtime.checks import RowError
from stride_lightning.tasks.inference import infer_task_of
from stride_lightning.tasks.texts import is_packed, logits_of, max_length, unpack, vocabulary_size
from tests.helpers.gradient_models import QUIET, attributed, close_scores
from tests.helpers.language_models import (
    CAUSAL,
    IGNORED,
    POSITIONS,
    VOCABULARY,
    ByArguments,
    ByBatch,
    Texts,
    Wrapped,
    bert,
    gpt2,
    gradients_by_hand,
    left_padded,
    llama,
    loader,
    loss_by_hand,
    packed,
    padded,
    plain_gpt,
    texts,
    widely_padded,
)
from tests.helpers.tiny import random_tensor

TEXTS = texts(6)


def losses_of(model, batch, task=None):
    """Losses as a method computes them."""
    task = CausalLanguageModeling() if task is None else task
    with torch.no_grad():
        task.check_batch(model, batch)
        return task.loss(task.outputs(model, task.inputs(batch)), task.encode(task.targets(batch), VOCABULARY))


def rows_of(batch):
    """Batches of one text each."""
    return [{name: value[row : row + 1] for name, value in batch.items()} for row in range(len(TEXTS))]


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ---- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAUSAL)
def test_loss_is_that_of_transformers(kind):
    model, batch = CAUSAL[kind](), padded(TEXTS)
    with torch.no_grad():
        expected = [model(**row).loss for row in rows_of(batch)]
    # transformers computes losses in single precision.
    close(losses_of(model, batch), torch.stack(expected).double(), 1e-5)


@pytest.mark.parametrize("kind", [*CAUSAL, "plain"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_by_hand(kind, reduction):
    model, task = {**CAUSAL, "plain": plain_gpt}[kind](), CausalLanguageModeling(reduction)
    with torch.no_grad():
        expected = torch.stack([loss_by_hand(model, one, reduction) for one in TEXTS])
    for collate_fn in [padded, widely_padded, packed, *([] if kind in ("GPT-2", "plain") else [left_padded])]:
        # Llama's rotations of positions are in single precision, and padding on the left moves them.
        close(losses_of(model, collate_fn(TEXTS), task), expected, 1e-5 if collate_fn is left_padded else 1e-12)


def test_absolute_positions_move_with_padding_on_the_left():
    model, batch = gpt2(), left_padded(TEXTS)
    expected = losses_of(model, padded(TEXTS))
    with pytest.warns(UserWarning, match="padded on the left"):
        assert (losses_of(model, batch) - expected).abs().max() > 1e-3
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    close(losses_of(model, {**batch, "position_ids": positions}), expected)
    # A single text, whose padding has the position 0 too, is not taken for several that are packed.
    rows = rows_of({**batch, "position_ids": positions})
    close(torch.cat([losses_of(model, row) for row in rows]), expected)


def test_weights_of_tokens():
    weights = [[0.3 * i + 0.1 for i in range(len(one["labels"]))] for one in TEXTS]
    weighted = Texts([{**one, "loss_weights": own} for one, own in zip(TEXTS, weights, strict=True)])
    model = llama()
    for reduction in ("mean", "sum"):
        with torch.no_grad():
            expected = torch.stack([loss_by_hand(model, one, reduction) for one in weighted])
        # Weights come in single precision.
        close(losses_of(model, padded(weighted), CausalLanguageModeling(reduction)), expected, 1e-6)
    equal = Texts([{**one, "loss_weights": [7.0] * len(one["labels"])} for one in TEXTS])
    close(losses_of(model, padded(equal)), losses_of(model, padded(TEXTS)))


def test_labels_are_the_ids_where_there_are_none():
    model, unlabelled = gpt2(), Texts([{"input_ids": one["input_ids"]} for one in TEXTS])
    every = Texts([{"input_ids": one["input_ids"], "labels": one["input_ids"]} for one in TEXTS])
    close(losses_of(model, padded(unlabelled)), losses_of(model, padded(every)))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    close(losses_of(plain_gpt(), ids), losses_of(plain_gpt(), {"input_ids": ids}))


def test_what_the_mask_hides_never_counts():
    model, batch = llama(), padded(TEXTS, length=8, fill=3)
    labelled = {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 3)}
    close(losses_of(model, labelled), losses_of(model, batch))
    left = left_padded(TEXTS)  # here the first token would be predicted from padding
    encoded = CausalLanguageModeling().targets({**left, "labels": left["input_ids"]})
    lengths = [len(one["input_ids"]) for one in TEXTS]
    assert (encoded[..., 1] > 0).sum(1).tolist() == [length - 1 for length in lengths]


def test_shifted_batches_of_plain_code():
    generator = torch.Generator().manual_seed(0)
    whole, model = torch.randint(1, VOCABULARY, (4, 6), generator=generator), plain_gpt()
    shifted, task = (whole[:, :-1], whole[:, 1:]), CausalLanguageModeling()
    expected = losses_of(model, {"input_ids": whole})
    close(losses_of(model, shifted), expected)
    close(losses_of(model, list(shifted)), expected)
    hidden = whole[:, 1:].clone()
    hidden[:, :3] = IGNORED
    beside = torch.nn.functional.pad(hidden, (1, 0), value=IGNORED)
    close(losses_of(model, (whole[:, :-1], hidden)), losses_of(model, {"input_ids": whole, "labels": beside}))
    aligned, ahead = CausalLanguageModeling(shifted=False), CausalLanguageModeling(shifted=True)
    assert aligned.targets((whole, whole)).equal(task.targets({"input_ids": whole}))
    assert ahead.targets({"input_ids": shifted[0], "labels": shifted[1]}).equal(task.targets(shifted))
    assert repr(ahead) == "CausalLanguageModeling(reduction='mean', shifted=True)"
    with pytest.raises(ValueError, match=r"expected one place ahead.*shifted=False"):
        task.targets((whole, whole))
    with pytest.raises(ValueError, match=r"expected beside their tokens.*shifted=True"):
        task.targets({"input_ids": shifted[0], "labels": shifted[1]})
    # Whether an answer repeats a token or not, it is read alike.
    answer = torch.tensor([[7, 8, 9, 5]]), torch.tensor([[IGNORED, IGNORED, IGNORED, 5]])
    assert task.targets(answer)[0, 3].tolist() == [5, 1]
    assert task.targets(shifted)[..., 0].equal(whole[:, 1:].float())


def test_packed_batches_become_rows():
    batch = packed(TEXTS)
    assert is_packed(batch)
    assert not is_packed(padded(TEXTS))
    assert batch["input_ids"].shape[0] == 1
    task = CausalLanguageModeling()
    inputs, expected = task.inputs(batch), padded(TEXTS)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].equal(expected["input_ids"])
    assert inputs["attention_mask"].equal(expected["attention_mask"])
    assert task.targets(batch).equal(task.targets(expected))
    positions = torch.tensor([[0, 1, 0, 0, 1, 2]])
    rows = unpack(torch.tensor([[1, 2, 3, 4, 5, 6]]), positions, 9)
    assert rows.tolist() == [[1, 2, 9], [3, 9, 9], [4, 5, 6]]
    assert unpack("text", positions, 0) == "text"


# ---- derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_derivatives_in_the_outputs(reduction):
    task, batch = CausalLanguageModeling(reduction), padded(TEXTS)
    batch["loss_weights"] = random_tensor(*batch["labels"].shape, seed=3).abs() + 0.2
    outputs = random_tensor(*batch["labels"].shape, VOCABULARY, seed=4)
    encoded = task.encode(task.targets(batch), VOCABULARY).double()
    with torch.enable_grad():
        outputs.requires_grad_()
        loss = task.loss(outputs, encoded)
        (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    outputs, weights = outputs.detach(), task.output_weights(encoded)
    mean = task.mean(outputs)
    one_hot = F.one_hot(encoded[..., 0].long(), VOCABULARY)
    close(gradient, weights * (mean - one_hot))
    row = 1
    hessian = torch.autograd.functional.hessian(lambda o: task.loss(o[None], encoded[row : row + 1])[0], outputs[row])
    direction = random_tensor(*outputs.shape, seed=5)
    expected = torch.einsum("tvsw,sw->tv", hessian, direction[row])
    close((weights * task.curvature(mean, direction))[row], expected)
    diagonal = torch.einsum("tvtv->tv", hessian)
    close((weights * task.curvature_diagonal(mean))[row], diagonal)
    total = 0
    for column in range(outputs[row].numel()):
        unit = torch.zeros_like(outputs)
        unit.flatten(1)[:, column] = 1
        root = (task.curvature_root(mean, unit) * weights.sqrt())[row].flatten()
        total = total + torch.outer(root, root)
    close(total, hessian.reshape(total.shape))


def test_losses_of_tokens():
    task, model, batch = CausalLanguageModeling(), gpt2(), padded(TEXTS)
    with torch.no_grad():
        outputs = task.outputs(model, task.inputs(batch))
    encoded = task.encode(task.targets(batch), VOCABULARY)
    expected = F.cross_entropy(outputs.transpose(1, 2), encoded[..., 0].long(), reduction="none")
    close(task.token_losses(outputs, encoded), expected)
    assert task.output_weights(encoded).shape == (*batch["labels"].shape, 1)
    close(task.output_weights(encoded).sum(1), torch.ones(len(TEXTS), 1), 1e-6)


# ---- models -----------------------------------------------------------------------------------------------------


class LabelsFirst(nn.Module):
    """Returns its loss before its logits, and cannot do without labels."""

    def __init__(self):
        super().__init__()
        self.model = gpt2()

    def forward(self, input_ids, labels):
        output = self.model(input_ids=input_ids, labels=labels)
        return output.loss, output.logits


WRAPPED = {
    "alone": gpt2,
    "keywords": Wrapped,
    "arguments": ByArguments,
    "a batch": ByBatch,
    "compiled": lambda: torch.compile(gpt2()),
}


@pytest.mark.parametrize("kind", WRAPPED)
@torch.compiler.set_stance("force_eager")
def test_every_way_to_wrap_a_model(kind):
    model, expected = WRAPPED[kind](), losses_of(gpt2(), padded(TEXTS))
    assert repr(infer_task_of(padded(TEXTS), model)) == "CausalLanguageModeling(reduction='mean')"
    close(losses_of(model, padded(TEXTS)), expected)
    rows = gradients_by_hand(gpt2(), TEXTS)
    if hasattr(model, "training_step"):  # whose loss is a mean over all tokens of a batch
        counts = (padded(TEXTS)["labels"][:, 1:] != IGNORED).sum(1).double()
        rows = rows * (counts / counts.mean())[:, None]
    close_scores(attributed(model, loader(TEXTS), "grad-dot", batch_size=4).scores, rows @ rows.T)


def test_logits_among_other_outputs():
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = gpt2()(ids).logits
        close(logits_of(LabelsFirst().eval(), {"input_ids": ids}), expected)
        close(logits_of(gpt2(), {"input_ids": ids}), expected)
        assert logits_of(gpt2(use_cache=True), {"input_ids": ids}).shape == expected.shape


class LossOnly(Wrapped):
    def forward(self, **batch):
        return self.model(**batch).loss


class TwoTexts(Wrapped):
    def forward(self, input_ids, other):
        return self.model(input_ids)


class LastTokenOnly(nn.Module):
    """Predicts the next token alone where it is not given targets."""

    def __init__(self):
        super().__init__()
        self.model = plain_gpt()

    def forward(self, ids, targets=None):
        return self.model(ids)[:, -1:], None


def test_outputs_without_logits_of_every_token():
    with pytest.raises(TypeError, match="LossOnly gave NoneType for a batch of token ids, expected logits"):
        infer_task_of(padded(TEXTS), LossOnly())
    with pytest.raises(TypeError, match=r"TwoTexts\.forward\(input_ids, other\) was given what it names of a dict"):
        infer_task_of(padded(TEXTS), TwoTexts())
    ids = TensorDataset(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(TypeError, match=r"logits of shape \(3, 1, 7\) for token ids of shape \(3, 4\)"):
        attributed(LastTokenOnly(), ids, "grad-dot", task=CausalLanguageModeling())


def test_what_models_say_of_themselves():
    for model in (gpt2(), llama(), bert(), Wrapped(), torch.compile(gpt2())):
        assert (vocabulary_size(model), max_length(model)) == (VOCABULARY, POSITIONS)
    assert (vocabulary_size(plain_gpt()), max_length(plain_gpt())) == (None, None)


# ---- inference of the task --------------------------------------------------------------------------------------


def test_inference_of_the_task():
    ids = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    labels = torch.tensor([0, 2])
    assert isinstance(infer_task_of(ids, gpt2()), CausalLanguageModeling)
    for batch in (ids, {**ids, "labels": labels}, {**ids, "label": labels}):
        assert isinstance(infer_task_of(batch, bert()), SequenceClassification)
    with pytest.raises(ValueError, match=r"labels float32 tensor of shape \(2,\) and outputs"):
        infer_task_of({**ids, "labels": labels.float()}, bert())
    whole = ids["input_ids"]
    assert isinstance(infer_task_of((whole[:, :-1], whole[:, 1:]), plain_gpt()), CausalLanguageModeling)
    # Labels of tokens could be classes of their own, such as parts of speech, or tokens that were masked.
    for other in (torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor([[2, 3, 3], [5, 6, 6]])):
        with pytest.raises(ValueError, match=r"has labels that are not its input_ids.*Masked language models"):
            infer_task_of({**ids, "labels": other}, gpt2())

    with pytest.raises(ValueError, match="look like probabilities"):
        infer_task_of((whole[:, :-1], whole[:, 1:]), nn.Sequential(plain_gpt(), nn.Softmax(-1)))


def test_classes_of_texts():
    task, model = SequenceClassification(), bert()
    batch = {**padded([{"input_ids": one["input_ids"]} for one in TEXTS]), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    with torch.no_grad():
        actual = task.loss(task.outputs(model, task.inputs(batch)), task.encode(task.targets(batch), 3).double())
        logits = torch.cat([model(input_ids=torch.tensor([one["input_ids"]])).logits for one in TEXTS])
        expected = F.cross_entropy(logits, batch["labels"], reduction="none")
        whole = model(**batch).loss
    close(actual, expected)
    close(actual.mean(), whole)
    assert task.targets({"input_ids": batch["input_ids"]}) is None
    assert task.targets((batch["input_ids"], batch["labels"])) is batch["labels"]
    assert isinstance(task, Classification)


# ---- what is refused --------------------------------------------------------------------------------------------


def replaced(position, num=40, **values):
    """Texts, one of which is something else."""
    examples = list(texts(num, shortest=4))
    examples[position] = {**examples[position], **values}
    return Texts(examples)


BAD = {
    "an unknown id": ([1, 9, 2], [1, IGNORED, 2], r"has the token id 9, and the model knows 0\.\.6"),
    "a negative id": ([1, -1, 2], [1, -100, 2], "has the token id -1"),
    "another label": ([1, 2, 2], [1, 9, 2], "has labels that are not its input_ids"),
    "a long text": ([1] * 15, [1] * 15, "has 15 tokens .* the model takes 12"),
    "no text": ([], [], "has no tokens"),
    "one token": ([3], [3], "has no token to predict"),
    "nothing predicted": ([3, 4, 5], [IGNORED] * 3, "has no token to predict"),
    "first predicted alone": ([3, 4], [3, IGNORED], "has no token to predict"),
}


@pytest.mark.parametrize(("ids", "labels", "message"), BAD.values(), ids=BAD)
def test_bad_texts_are_named(ids, labels, message):
    good = loader(texts(5))
    early, late = (loader(replaced(position, input_ids=ids, labels=labels)) for position in (2, 17))
    # The first batch decides about the task, later ones are read.
    named = {"Training example 2": (early, good), "Training example 17": (late, good), "Query 17": (good, late)}
    for name, (data, queries) in named.items():
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            attributed(gpt2(), data, "grad-dot", queries, batch_size=8)


def test_a_text_of_the_training_indices_is_named_by_its_position():
    data = loader(replaced(17, input_ids=[1, 9, 2], labels=[1, 2, 2]))
    options = {"train_indices": [3, 17, 5], "method": "grad-dot", "batch_size": 2, **QUIET}
    for task in (None, CausalLanguageModeling()):
        with pytest.raises(ValueError, match=r"^Training example 17 has the token id 9"):
            self_influence(gpt2(), train_data=data, task=task, **options)


def test_ids_that_a_plain_model_does_not_know():
    ids = torch.ones(20, 4, dtype=torch.long)
    ids[13, 2] = 30
    labels = ids.masked_fill(ids == 30, IGNORED)
    task = CausalLanguageModeling(shifted=False)
    good, bad = TensorDataset(ids[:6]), TensorDataset(ids, labels)
    message = "13 has 4 tokens with ids up to 30, and the model has no embedding for one of them or its position"
    for data, queries, named in (
        (bad, good, f"Training example {message}"),
        (good, bad, f"Query {message}"),
        (TensorDataset(torch.ones(5, 14, dtype=torch.long)), good, "Training example 0 has 14 tokens"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            attributed(plain_gpt(), data, "grad-dot", queries, task=task, batch_size=4)


def test_padding_beyond_what_a_model_takes():
    with pytest.raises(ValueError, match=r"^Row 0 of the batch has 3 tokens \(its batch 14 with padding\)"):
        CausalLanguageModeling().check_batch(gpt2(), padded([{"input_ids": [1, 2, 3]}], length=14))


def test_rows_of_a_batch_are_named():
    task = CausalLanguageModeling()
    batch = padded(TEXTS)
    batch["loss_weights"] = torch.ones(batch["labels"].shape)
    batch["loss_weights"][3, 1] = -1
    with pytest.raises(
        RowError, match=r"Row 3 of the batch has a negative loss weight\. Give it 0 or more\."
    ) as caught:
        task.encode(task.targets(batch), VOCABULARY)
    assert caught.value.row == 3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": ["a"]}, r"integer `input_ids` of shape \(B, T\)"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, "got dict with keys"),
        (torch.ones(2, 3), "got float32 tensor"),
        ((torch.ones(2, 3).long(), torch.ones(2).long()), r"Expected labels of the shape of input_ids, \(2, 3\)"),
        ({"input_ids": torch.ones(2, 3).long(), "loss_weights": torch.ones(2)}, "Expected loss_weights of the shape"),
        ((torch.ones(2, 3).long(),) * 3, "name its items in a dictionary"),
    ],
)
def test_batches_that_are_none(batch, message):
    with pytest.raises((TypeError, ValueError), match=message):
        CausalLanguageModeling().targets(batch)


def test_what_a_sequence_has_not():
    task = CausalLanguageModeling()
    outputs, encoded = torch.zeros(1, 3, 8), torch.ones(1, 3, 2)
    with pytest.raises(ValueError, match="A sequence has no margin"):
        task.margin(outputs, encoded)
    with pytest.raises(ValueError, match="Let the model generate"):
        task.predict(outputs)
    assert task.decode(encoded) is None
    assert task.shown(encoded) is None
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        CausalLanguageModeling("median")


def test_a_mask_of_another_shape_is_refused():
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
    with pytest.raises(TypeError, match=r"Expected an attention_mask of shape \(2, 5\) as input_ids, got .*\(2, 3\)"):
        CausalLanguageModeling().check_batch(gpt2(), batch)
