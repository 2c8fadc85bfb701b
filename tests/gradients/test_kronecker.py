"""EK-FAC against explicit Kronecker products, from what enters and leaves each layer in one example after the other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stride_lightning.gradients import kronecker, signs
from tests.helpers.gradient_models import (
    TASKS,
    TiedHead,
    TokenModel,
    Twice,
    blocks_of,
    close_scores,
    cnn,
    exact_scores,
    fitted,
    gradients_of,
    jacobians_of,
    mlp,
    pictures_for,
    points_for,
    second_derivatives,
    seeded,
    targets_for,
    tokens,
    words_for,
)
from tests.helpers.tiny import random_tensor

DAMPING = 0.3


def roots(matrices):
    """``R`` with ``R R'`` for each matrix."""
    values, vectors = torch.linalg.eigh(matrices)
    return vectors * values.clamp(min=0).sqrt()[:, None]


def curvature_columns(model, task, data):
    """Vectors ``(n, r, p)`` whose outer products sum to the Gauss-Newton matrix of each example."""
    return torch.einsum("ncp,ncr->nrp", jacobians_of(model, data), roots(second_derivatives(model, task, data)))


def traced(model, x):
    """Outputs of one example, and by layer what entered it and the tensor that left it."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if name and not list(module.children()):
            handles.append(
                module.register_forward_hook(lambda m, a, out, name=name: seen.setdefault(name, []).append((a[0], out)))
            )
    with torch.enable_grad():
        outputs = model(x[None]).flatten()
    for handle in handles:
        handle.remove()
    return outputs, seen


def places_of(module, entered):
    """What entered a layer at each place, ``(T, R)``, with a one for the bias."""
    entered = entered.detach()
    if isinstance(module, nn.Conv1d):
        entered = F.unfold(F.pad(entered, (1, 1))[:, :, None], (1, module.kernel_size[0]))[0].T
    rows = entered.reshape(-1, entered.shape[-1])
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1) if module.bias is not None else rows


def left_of(module, back):
    back = back[0] if back.ndim > 2 or isinstance(module, nn.Conv1d) else back
    return back.T if isinstance(module, nn.Conv1d) else back.reshape(-1, back.shape[-1])


def matrix_places(model, name):
    """Places in a vector of all parameters of a block, as a matrix whose last column is the bias."""
    at, weight = blocks_of(model)[name], model.get_parameter(name)
    parts = at[: weight.numel()].view(len(weight), -1), at[weight.numel() :].view(len(weight), -1)
    return torch.cat(parts, 1) if len(at) > weight.numel() else parts[0]


def by_hand(model, task, data, queries, damping, scored=gradients_of):
    """Scores times n, and the mean corrected eigenvalue."""
    columns = curvature_columns(model, task, data)
    covariances = {}
    for (x, _), second in zip(zip(*data.tensors, strict=True), second_derivatives(model, task, data), strict=True):
        outputs, seen = traced(model, x)
        for name, calls in seen.items():
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
                continue
            for entered, left in calls:
                back = torch.stack([torch.autograd.grad(o, left, retain_graph=True)[0] for o in outputs])
                back = torch.stack([left_of(module, one) for one in back])  # (C, T, L)
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    back = back * (entered.flatten() != module.padding_idx)[:, None]
                a, s = covariances.setdefault(name, [0, 0])
                if not isinstance(module, nn.Embedding):
                    here = places_of(module, entered)
                    a = a + here.T @ here
                covariances[name] = [a, s + torch.einsum("ctl,cd,dtm->lm", back, second, back)]

    solved, spectra = [], []
    of_queries, of_data = (scored(model, task, part) for part in (queries, data))
    for name, flat in blocks_of(model).items():
        module = name.rpartition(".")[0]
        if isinstance(model.get_submodule(module), nn.Embedding):
            _, right = torch.linalg.eigh(covariances[module][1])
            at, basis = flat, torch.kron(torch.eye(len(flat) // len(right), dtype=right.dtype), right.contiguous())
        elif module in covariances:
            at = matrix_places(model, name).flatten()
            basis = torch.kron(*(torch.linalg.eigh(m)[1] for m in covariances[module][::-1]))
        else:
            rows = columns[:, :, flat].flatten(0, 1)
            at, basis = flat, torch.linalg.eigh(rows.T @ rows)[1]
        spectrum = (columns[:, :, at] @ basis).square().sum(1).mean(0)
        spectra.append(spectrum)
        solved.append((of_queries[:, at] @ basis, of_data[:, at] @ basis))
    mean = torch.cat(spectra).mean()
    return sum(a / (values + damping * mean) @ b.T for (a, b), values in zip(solved, spectra, strict=True)), mean


CASES = {
    **{name: (lambda name=name: mlp(num_outputs=TASKS[name][1]), points_for(name), TASKS[name][0]) for name in TASKS},
    "pictures": (cnn, pictures_for(), TASKS["classification"][0]),
    "words": (lambda: seeded(TokenModel), words_for(), TASKS["classification"][0]),
}


@pytest.mark.parametrize("name", CASES)
def test_explicit_products(name):
    make, data, task = CASES[name]
    model = make()
    queries = type(data)(*(t[:5] + (0.1 if t.is_floating_point() else 0) for t in data.tensors))
    expected, mean = by_hand(model, task, data, queries, DAMPING)
    for batch_size in (100, 4):
        attributor = fitted(model, data, "ekfac", damping=DAMPING, task=task, batch_size=batch_size)
        assert attributor._fitted[0].curvature.mean_eigenvalue == pytest.approx(float(mean), rel=1e-6)
        torch.testing.assert_close(exact_scores(attributor, queries), expected, rtol=1e-7, atol=1e-9)
    close_scores(attributor.attribute(queries).scores, expected / len(data))


@pytest.mark.parametrize(("limit", "value"), [("MAX_SIDE", 3), ("MAX_VECTOR", 3)])
@pytest.mark.parametrize("kind", ["points", "words", "tied"])
def test_wide_sides_keep_their_own_basis(kind, limit, value, monkeypatch):
    """Whatever the basis, Lambda is the diagonal of the Gauss-Newton matrix there, and the scores are those of it."""
    model, data = {
        "points": lambda: (mlp(), points_for()),
        "words": lambda: (seeded(TokenModel), words_for()),
        "tied": lambda: (seeded(TiedHead), words_for(length=4)),
    }[kind]()
    monkeypatch.setattr(kronecker, limit, value)
    monkeypatch.setattr(signs, "MAX_EXACT_OUTPUTS", 50)
    attributor = fitted(model, data, "ekfac", damping=DAMPING)
    curvature = attributor._fitted[0].curvature
    is_unrotated = {name: (basis.left is None, basis.right is None) for name, basis in curvature._bases.items()}
    if limit == "MAX_SIDE":
        expected = {
            "points": {"0.weight": (True, True), "2.weight": (False, True)},
            "words": {"embedding.weight": (True, True), "norm.weight": (False, True), "out.weight": (False, True)},
            "tied": {"embedding.weight": (True, True), "linear.weight": (True, True)},
        }[kind]
    else:
        expected = {"points": {}, "words": {"norm.weight": (True, True)}, "tied": {"norm.bias": (True, True)}}[kind]
    assert {name: is_unrotated[name] for name in expected} == expected
    assert exact_scores(attributor, data).isfinite().all()

    trace = curvature_columns(model, attributor.task, data).square().sum((1, 2)).mean()
    assert float(sum(v.sum() for v in curvature._eigenvalues.values())) == pytest.approx(float(trace), rel=1e-9)


def test_a_matrix_used_twice_and_one_not_used():
    """A shared layer has the sum over its calls; a layer without gradients adds nothing and spoils nothing."""
    model = seeded(Twice)
    data = type(points_for())(random_tensor(14, 6, seed=0), targets_for(TASKS["classification"][0], 3, 14, 1))
    attributor = fitted(model, data, "ekfac", damping=DAMPING)
    task = attributor.task
    scores = exact_scores(attributor, data)
    assert scores.isfinite().all()
    columns = curvature_columns(model, task, data)
    curvature, expected = attributor._fitted[0].curvature, 0
    grads = gradients_of(model, task, data)
    for name in ("shared.weight", "out.weight"):
        at, basis = matrix_places(model, name).flatten(), curvature._bases[name]
        basis = torch.kron(basis.left, basis.right)
        spectrum = (columns[:, :, at] @ basis).square().sum(1).mean(0)
        projected = grads[:, at] @ basis
        expected = expected + projected / (spectrum + curvature.absolute_damping) @ projected.T
    torch.testing.assert_close(scores, expected, rtol=1e-7, atol=1e-9)


def test_tokens_of_the_padding_index_have_no_gradient():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.embedding(x)).mean(1)

    model = seeded(Padded)
    data = type(points_for())(tokens(14, 3, size=5), targets_for(TASKS["classification"][0], 3, 14, 1))
    expected, _ = by_hand(model, TASKS["classification"][0], data, data, DAMPING)
    torch.testing.assert_close(exact_scores(fitted(model, data, "ekfac", damping=DAMPING), data), expected)
