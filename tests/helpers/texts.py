"""Tiny language models and texts, and what STRIDE says of them by brute force."""

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import Dataset

VOCABULARY = 7
PAD = 0


class TinyLM(nn.Module):
    """A plain causal model: every hidden state is a running mean of embeddings, mixed by two blocks."""

    def __init__(self, vocabulary=VOCABULARY, width=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
            hidden = hidden + torch.tanh(block(hidden.cumsum(1) / counts))
        return self.head(hidden)


class LanguageModule(L.LightningModule):
    """An ordinary module; nothing in it knows about attribution."""

    def __init__(self):
        super().__init__()
        self.network = TinyLM()

    def forward(self, input_ids, attention_mask=None):
        return self.network(input_ids, attention_mask)

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"])[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Texts(Dataset):
    """Sequences of different lengths, some of their tokens without a label."""

    def __init__(self, count, seed=0, shortest=3, longest=6, vocabulary=VOCABULARY):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
        self.ids = [torch.randint(1, vocabulary, (int(n),), generator=generator) for n in lengths]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        labels = ids.clone()
        labels[1] = -100 if index % 3 == 0 else labels[1]
        return {"input_ids": ids, "labels": labels}


def padded(items, extra=0):
    """Collate with padding on the right, as much as this batch needs."""
    longest = max(len(item["input_ids"]) for item in items) + extra
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for item in items:
        fill = longest - len(item["input_ids"])
        batch["input_ids"].append(nn.functional.pad(item["input_ids"], (0, fill), value=PAD))
        batch["labels"].append(nn.functional.pad(item["labels"], (0, fill), value=-100))
        batch["attention_mask"].append(torch.arange(longest) < len(item["input_ids"]))
    return {name: torch.stack(values).long() for name, values in batch.items()}


def brute_tokens(model, item, layers):
    """Features, errors and weights of one sequence, token by token; float64."""
    seen, hooks = {}, []
    for name in layers:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0][0])))
    logits = model(item["input_ids"][None])[0]
    for hook in hooks:
        hook.remove()
    rows = []
    for place in range(len(item["input_ids"]) - 1):
        label = int(item["labels"][place + 1])
        if label == -100:
            continue
        error = logits[place].softmax(0)
        error = error - nn.functional.one_hot(torch.tensor(label), len(error))
        rows.append((torch.cat([seen[name][place] for name in layers] + [torch.ones(1)]), error))
    weight = 1 / len(rows)
    return [(phi.detach(), error.detach(), weight) for phi, error in rows]


def brute_scores(model, train, queries, layers, damping=(0.1, 1.0), head=None, diagonal=False):
    """The closed form with explicit loops and dense matrices, shape ``(q, n)``."""
    space = torch.eye(VOCABULARY, dtype=torch.float64) if head is None else head
    tokens = [[(p, space.T @ e, w) for p, e, w in brute_tokens(model, train[i], layers)] for i in range(len(train))]
    query_tokens = [
        [(p, space.T @ e, w) for p, e, w in brute_tokens(model, queries[i], layers)] for i in range(len(queries))
    ]
    every = [token for sequence in tokens for token in sequence]
    total = sum(w for _, _, w in every)
    width = (len(every[0][0]) - 1) // len(layers)
    scale = torch.ones(len(every[0][0]), dtype=torch.float64)
    for block in [slice(i * width, (i + 1) * width) for i in range(len(layers))]:
        scale[block] = (sum(w * p[block].square().sum() for p, _, w in every) / total) ** -0.5
    a = sum(w * torch.outer(scale * p, scale * p) for p, _, w in every) / total
    b = sum(w * torch.outer(e, e) for _, e, w in every) / total
    b = b.diagonal().diag() if diagonal else b
    a = a + damping[0] * a.trace() / len(a) * torch.eye(len(a))
    b = b + damping[1] * b.trace() / len(b) * torch.eye(len(b))
    curvature = torch.kron(a, b)

    def gradient(sequence):
        return sum(w * torch.outer(scale * p, e) for p, e, w in sequence).flatten()

    solved = torch.linalg.solve(curvature, torch.stack([gradient(sequence) for sequence in query_tokens]).T)
    return (torch.stack([gradient(sequence) for sequence in tokens]) @ solved).T / total
