"""Models of every kind of layer, and their gradients by brute force: one example after the other, in full."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import BinaryClassification, Classification, Regression, attribute
from stride_lightning.attribute import create
from tests.helpers.tiny import examples_of, random_targets, random_tensor

NUM_OUTPUTS = 3


# ---- models -----------------------------------------------------------------------------------------------------


def tokens(*shape, size=11, seed=0):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


class TiedHead(nn.Module):
    """One matrix is the embedding and the head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.linear(self.embedding(x))))).mean(1)


class Twice(nn.Module):
    """One layer runs twice, another is not used."""

    def __init__(self):
        super().__init__()
        self.shared, self.out, self.unused = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.shared(torch.tanh(self.shared(x))))


class SameWeight(nn.Module):
    """Two layers hold one matrix, each with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.out(self.two(torch.tanh(self.one(x))))


class Transformer(nn.Module):
    """Attention, with positions that are a parameter of the model itself."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(11, 4), nn.Parameter(torch.randn(3, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.2)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(self.embedding(x) + self.positions).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.recurrent(x)[0][:, -1])


class Adapter(nn.Module):
    """A frozen layer with a trainable correction of low rank, as in LoRA."""

    def __init__(self):
        super().__init__()
        self.base, self.out = nn.Linear(6, 5).requires_grad_(False), nn.Linear(5, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x):
        return self.out(torch.tanh(self.base(x) + self.up(self.down(x))))


class Scaled(nn.Module):
    """Raw parameters, one of them without an axis."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale, self.shift = nn.Linear(6, 3), nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * torch.tanh(self.linear(x)) + self.shift


class TokenModel(nn.Module):
    """Several places in every layer, and a head over all of them."""

    def __init__(self, size=11, width=4, num_outputs=NUM_OUTPUTS):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(size, width), nn.Linear(width, width)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, num_outputs)

    def forward(self, x):
        return self.out(self.norm(torch.tanh(self.linear(self.embedding(x))))).mean(1)


class GPT2(nn.Module):
    """Conv1D layers of transformers, tied embedding and head."""

    def __init__(self):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": 7, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 6}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    def forward(self, x):
        return self.model(x).logits[:, -1]


class DictModel(nn.Module):
    """Takes a dictionary of tensors."""

    def __init__(self):
        super().__init__()
        self.words, self.numbers, self.out = nn.Embedding(11, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.words(x["words"]).mean(1) + self.numbers(x["numbers"])))


class DictTask(Classification):
    """Reads batches that are dictionaries."""

    def inputs(self, batch):
        return {name: batch[name] for name in ("words", "numbers")}

    def targets(self, batch):
        return batch["label"]


class Everything(nn.Module):
    """Dropout, BatchNorm and an in-place activation; frozen in part."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.frozen, self.last = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.dropout(torch.relu_(self.frozen(self.norm(self.first(x))))))


def seeded(make, seed=0):
    """A model in float64 and eval mode with reproducible weights; none of its parameters is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double().eval()
        with torch.no_grad():
            for value in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
                value.add_(0.1 * torch.rand_like(value))
    return model


def mlp(num_inputs=4, num_outputs=NUM_OUTPUTS, width=5, seed=0):
    return seeded(lambda: nn.Sequential(nn.Linear(num_inputs, width), nn.Tanh(), nn.Linear(width, num_outputs)), seed)


def cnn(num_outputs=NUM_OUTPUTS, seed=0):
    """Several places in its first layer."""
    return seeded(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, num_outputs)), seed
    )


# ---- data -------------------------------------------------------------------------------------------------------

TASKS = {
    "classification": (Classification(), 3),
    "binary": (BinaryClassification(), 1),
    "regression": (Regression(noise_std=0.7), 1),
    "two real outputs": (Regression(), 2),
}


def targets_for(task, num_outputs, num, seed):
    targets = random_targets(task, num, num_outputs, seed)
    return targets.flatten() if isinstance(task, BinaryClassification) else targets


def points_for(name="classification", num=14, seed=0, num_inputs=4):
    """A data set of points for a task of ``TASKS``."""
    task, num_outputs = TASKS[name]
    return TensorDataset(random_tensor(num, num_inputs, seed=seed), targets_for(task, num_outputs, num, seed + 50))


def pictures_for(num=14, seed=0):
    targets = targets_for(Classification(), NUM_OUTPUTS, num, seed + 50)
    return TensorDataset(random_tensor(num, 2, 4, seed=seed), targets)


def words_for(num=14, seed=0, length=3):
    return TensorDataset(tokens(num, length, seed=seed), targets_for(Classification(), NUM_OUTPUTS, num, seed + 50))


# ---- brute force ------------------------------------------------------------------------------------------------


def trainable(model, layers=None):
    """Trainable parameters, all or those of some modules."""
    chosen = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if layers is not None:
        chosen = [name for name in chosen if name.rpartition(".")[0] in layers]
    return {name: model.get_parameter(name) for name in chosen}


def loss_of(task, outputs, target):
    """Loss of one example by torch's own functions."""
    if isinstance(task, Classification):
        return F.cross_entropy(outputs, target)
    if isinstance(task, BinaryClassification):
        return F.binary_cross_entropy_with_logits(outputs, target.reshape(outputs.shape).to(outputs))
    return (outputs - target.reshape(outputs.shape)).square().sum() / (2 * task.noise_std**2)


def margin_of(task, outputs, target):
    """Log-odds of the target of one example."""
    if isinstance(task, Classification):
        p = outputs.softmax(1)[0, target[0]]
    else:
        p = torch.sigmoid(outputs.flatten()[0] * (2 * target[0] - 1))
    return (p / (1 - p)).log()


def gradients_of(model, task, data, function=loss_of, layers=None):
    """Gradients of every example of a data set, shape ``(n, p)``: in the order of the parameters."""
    parameters = list(trainable(model, layers).values())
    rows = []
    for x, y in zip(*data.tensors, strict=True):
        with torch.enable_grad():
            gradients = torch.autograd.grad(function(task, model(x[None]), y[None]), parameters, allow_unused=True)
        rows.append(flat(gradients, parameters))
    return torch.stack(rows)


def jacobians_of(model, data, layers=None):
    """Derivatives of the outputs, shape ``(n, C, p)``."""
    parameters = list(trainable(model, layers).values())
    rows = []
    for x in data.tensors[0]:
        with torch.enable_grad():
            outputs = model(x[None]).flatten()
            gradients = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in outputs]
        rows.append(torch.stack([flat(one, parameters) for one in gradients]))
    return torch.stack(rows)


def second_derivatives(model, task, data):
    """Those of every loss in the outputs, shape ``(n, C, C)``, by torch's own Hessian of torch's own losses."""
    hessians = []
    for x, y in zip(*data.tensors, strict=True):
        with torch.enable_grad():
            outputs = model(x[None]).detach()
            hessian = torch.autograd.functional.hessian(lambda o, y=y: loss_of(task, o, y[None]), outputs)
        hessians.append(hessian.reshape(outputs.numel(), outputs.numel()))
    return torch.stack(hessians)


def gauss_newton_of(model, task, data, layers=None):
    """The whole matrix of the mean loss, shape ``(p, p)``."""
    jacobians = jacobians_of(model, data, layers)
    return torch.einsum("ncp,ncd,ndq->pq", jacobians, second_derivatives(model, task, data), jacobians) / len(data)


def inverse_of(matrix, damping):
    """The inverse of a damped matrix."""
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))


def blocks_of(model, layers=None, *, joined=True):
    """Places in a vector of all parameters by block: a weight matrix with its bias, or one parameter."""
    places, start = {}, 0
    for name, parameter in trainable(model, layers).items():
        places[name] = torch.arange(start, start + parameter.numel())
        start += parameter.numel()
    if joined:
        for name in list(places):
            module = name.rpartition(".")[0]
            is_layer = isinstance(model.get_submodule(module), nn.Linear | nn.Conv1d | nn.Conv2d)
            if name.endswith("bias") and is_layer:
                places[f"{module}.weight"] = torch.cat([places[f"{module}.weight"], places.pop(name)])
    return places


def flat(gradients, parameters):
    """One vector of the gradients of all parameters; zero for one that does not enter."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).detach()


# ---- what must be as before -------------------------------------------------------------------------------------


def condition_of(model):
    """Everything of a model that attribution must leave alone."""
    hooks = [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": hooks,
        "training": [module.training for module in model.modules()],
        "parameters": [(id(p), p.requires_grad, copy.deepcopy(p.grad)) for p in model.parameters()],
        "random": torch.get_rng_state(),
        "gradients": torch.is_grad_enabled(),
    }


def check_same_condition(before, model):
    after = condition_of(model)
    for name in ("state", "parameters", "random"):
        torch.testing.assert_close(after.pop(name), before[name], rtol=0, atol=0)
    assert after == {name: before[name] for name in after}


# ---- scores -----------------------------------------------------------------------------------------------------

QUIET = {"show_progress": False}
#: Options that make every method exact, or as good as; with strong damping the series of influence-lissa is short.
EXACT = {
    "grad-dot": {},
    "grad-cos": {},
    "diagonal": {"damping": 0.3},
    "datainf": {"damping": 0.3},
    "ekfac": {"damping": 0.3},
    "influence-cg": {"damping": 0.3, "tolerance": 1e-9},
    "influence-lissa": {"damping": 50.0, "depth": 20},
    "last-layer": {"damping": 0.3, "tolerance": 1e-9},
    "logra": {"damping": 0.3},
    "trak": {"damping": 0.3},
    "trak-newton": {"damping": 0.3},
}


def fitted(model, data, method, **options):
    """An attributor after its fit."""
    task = options.pop("task", None)
    return create(method, **QUIET | options).fit(model, data, task)


def attributed(model, data, method, queries=None, **options):
    """An attribution with the exact options of its method; of the training data itself by default."""
    options = QUIET | EXACT.get(method, {}) | options
    return attribute(model, data if queries is None else queries, train_data=data, method=method, **options)


def save_weights(folder, num=2):
    """A folder of some models' weights."""
    for seed in range(num):
        torch.save(mlp(seed=seed).state_dict(), folder / f"{seed}.pt")
    return folder


@torch.no_grad()
def exact_scores(attributor, queries):
    """Scores of an attributor of one checkpoint before they are scaled and rounded to float32."""
    query_reading = attributor.read(attributor.model, examples_of(*queries.tensors), torch.device("cpu"), "label")
    (one,) = attributor._fitted
    side = attributor._query_side(one, query_reading, slice(0, len(query_reading)))
    return torch.cat([side.inner(gradients) for _, gradients in one.side.gradients()], 1)


def close_scores(scores, expected, tolerance=1e-5):
    """Relative to the largest score; the default is the rounding of float32 scores."""
    torch.testing.assert_close(scores.double(), expected.double(), rtol=0, atol=tolerance * float(expected.abs().max()))
