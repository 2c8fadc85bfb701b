"""Tiny language models built from configs, token data of several lengths, and the ways they become batches."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from tests.helpers.gradient_models import flat, trainable

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH, POSITIONS = 7, 4, 12
IGNORED = -100


def _built(make, seed, dtype):
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                # Large enough for predictions that are far from uniform.
                parameter.copy_(0.5 * torch.randn(parameter.shape) + (parameter.ndim == 1 and parameter.mean() > 0.5))
    return model.to(dtype).train(seed is None)


def gpt2(seed=0, dtype=torch.float64, layers=1, **options):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_head=2, n_layer=layers, n_positions=POSITIONS, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options,
    )  # fmt: skip
    return _built(lambda: transformers.GPT2LMHeadModel(config), seed, dtype)


_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_SIZES_OF_CAUSAL = {**_SIZES, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}


def llama(seed=0, dtype=torch.float64):
    return _built(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES_OF_CAUSAL)), seed, dtype)


def qwen2(seed=0, dtype=torch.float64):
    return _built(lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES_OF_CAUSAL)), seed, dtype)


def bert(seed=0, dtype=torch.float64):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**_SIZES, **rates, num_labels=3)
    return _built(lambda: transformers.BertForSequenceClassification(config), seed, dtype)


class PlainGPT(nn.Module):
    """A causal transformer of torch's own layers, on token ids alone."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.attention, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))[None]
        query, key, value = self.attention(self.norm(x)).chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(query, key, value, is_causal=True))


def plain_gpt(seed=0, dtype=torch.float64):
    return _built(PlainGPT, seed, dtype)


CAUSAL = {"GPT-2": gpt2, "Llama": llama, "Qwen2": qwen2}


class Wrapped(L.LightningModule):
    """Hugging Face's own loss of a batch: the mean over all its tokens."""

    def __init__(self, model=None, lr=0.1):
        super().__init__()
        self.model, self.lr = gpt2() if model is None else model, lr

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ByArguments(Wrapped):
    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class ByBatch(Wrapped):
    def forward(self, batch):
        return self.model(**batch)


# ---- data -------------------------------------------------------------------------------------------------------


class Texts(Dataset):
    """Dictionaries of lists, as a tokenizer gives them."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, position):
        return self.examples[position]


def texts(num=9, seed=0, shortest=3, longest=5, prompt=True):
    """Texts of several lengths; some have a prompt that is not predicted."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (num,), generator=generator).tolist()
    examples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        hidden = 2 if prompt and number % 3 == 1 else 0
        examples.append({"input_ids": ids, "labels": [IGNORED] * hidden + ids[hidden:]})
    return Texts(examples)


def padded(examples, side="right", length=None, fill=0):
    """A batch as long as its longest example, or longer."""
    longest = max(len(one["input_ids"]) for one in examples) if length is None else length

    def pad(values, value):
        missing = [value] * (longest - len(values))
        return missing + list(values) if side == "left" else list(values) + missing

    batch = {
        "input_ids": torch.tensor([pad(one["input_ids"], fill) for one in examples], dtype=torch.long),
        "attention_mask": torch.tensor([pad([1] * len(one["input_ids"]), 0) for one in examples]),
    }
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([pad(one["labels"], IGNORED) for one in examples], dtype=torch.long)
    if "loss_weights" in examples[0]:
        batch["loss_weights"] = torch.tensor([pad(one["loss_weights"], 0.0) for one in examples])
    return batch


left_padded, widely_padded = partial(padded, side="left"), partial(padded, length=11, fill=3)


def encoded(examples):
    """What collators of transformers give, which is no dict."""
    return transformers.BatchEncoding(padded(examples))


def packed(examples):
    """One row, as DataCollatorWithFlattening makes it."""
    batch = transformers.DataCollatorWithFlattening(return_tensors="pt")([dict(one) for one in examples])
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def loader(data, collate_fn=padded, batch_size=4, **options):
    return DataLoader(data, batch_size=batch_size, collate_fn=collate_fn, **options)


# ---- brute force ------------------------------------------------------------------------------------------------


def loss_by_hand(model, example, reduction="mean"):
    """Loss of one text, by torch's own cross-entropy; without padding and attention mask."""
    ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
    logits = model(ids) if isinstance(model, PlainGPT) else model(input_ids=ids).logits
    losses = F.cross_entropy(logits[0, :-1], labels, reduction="none", ignore_index=IGNORED)
    weights = (labels != IGNORED).to(losses)
    if "loss_weights" in example:
        weights = weights * torch.tensor(example["loss_weights"])[1:]
    total = (losses * weights).sum()
    return total / weights.sum() if reduction == "mean" else total


def gradients_by_hand(model, data, layers=None, reduction="mean"):
    """Gradients of the loss of every text alone, shape ``(n, p)``."""
    parameters, rows = list(trainable(model, layers).values()), []
    for example in data:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss_by_hand(model, example, reduction), parameters, allow_unused=True)
        rows.append(flat(gradients, parameters))
    return torch.stack(rows)


def gauss_newton_by_hand(model, data, layers=None):
    """The matrix of the mean loss, from the derivatives of every logit of every text; shape ``(p, p)``."""
    parameters = list(trainable(model, layers).values())
    total = 0
    for example in data:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        counted = (labels != IGNORED).nonzero().flatten().tolist()
        with torch.enable_grad():
            logits = (model(ids) if isinstance(model, PlainGPT) else model(input_ids=ids).logits)[0]
            for token in counted:
                options = {"retain_graph": True, "allow_unused": True}
                rows = [flat(torch.autograd.grad(value, parameters, **options), parameters) for value in logits[token]]
                jacobian, p = torch.stack(rows), logits[token].detach().softmax(0)
                total = total + jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian / len(counted)
    return total / len(data)
