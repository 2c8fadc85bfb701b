"""Every method against explicit matrices made of gradients that were taken one example after the other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import Attributor, BinaryClassification, Classification
from stride_lightning.attribute import create, methods
from stride_lightning.gradients.attributor import GradientAttributor
from stride_lightning.model.blocks import Block, Gradients, Outer
from tests.helpers.gradient_models import (
    EXACT,
    TASKS,
    TokenModel,
    attributed,
    blocks_of,
    close_scores,
    cnn,
    exact_scores,
    fitted,
    gauss_newton_of,
    gradients_of,
    inverse_of,
    jacobians_of,
    loss_of,
    margin_of,
    mlp,
    pictures_for,
    points_for,
    save_weights,
    second_derivatives,
    seeded,
    words_for,
)
from tests.helpers.tiny import correlation, random_tensor

NUM_QUERIES = 5
#: Torch's own, of the first forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")


def case(kind):
    """A task, a model, training data and queries."""
    if kind == "pictures":
        return Classification(), cnn(), pictures_for(), pictures_for(NUM_QUERIES, seed=1)
    if kind == "words":
        return Classification(), seeded(TokenModel), words_for(), words_for(NUM_QUERIES, seed=1)
    if kind == "more examples than parameters":
        return Classification(), mlp(width=1), points_for(num=30), points_for(num=NUM_QUERIES, seed=1)
    task, num_outputs = TASKS[kind]
    return task, mlp(num_outputs=num_outputs), points_for(kind), points_for(kind, NUM_QUERIES, seed=1)


KINDS = [*TASKS, "pictures", "words", "more examples than parameters"]


def by_blocks(model, grads, inverse):
    """``g_q' H^-1 g_i`` with an inverse for each block."""
    mine, theirs = grads
    return sum(mine[:, at] @ inverse(at) @ theirs[:, at].T for at in blocks_of(model).values())


def diagonal(model, task, data, grads, damping, described):
    squares = grads[1].square().mean(0)
    return grads[0] / (squares + damping * squares.mean()) @ grads[1].T


def datainf(model, task, data, grads, damping, described):
    """The literal formula: an inverse for every example, and the mean of them."""

    def inverse(at):
        rows = grads[1][:, at]
        return sum(inverse_of(torch.outer(row, row), damping * rows.square().mean()) for row in rows) / len(rows)

    return by_blocks(model, grads, inverse)


def gauss_newton(model, task, data, grads, damping, described, layers=None):
    return grads[0] @ inverse_of(gauss_newton_of(model, task, data, layers), described["damping"]) @ grads[1].T


def blocks_of_gauss_newton(model, task, data, grads, damping, described):
    matrix = gauss_newton_of(model, task, data)
    return by_blocks(model, grads, lambda at: inverse_of(matrix[at][:, at], described["damping"]))


REFERENCES = {
    "grad-dot": lambda model, task, data, grads, damping, described: grads[0] @ grads[1].T,
    "grad-cos": lambda model, task, data, grads, damping, described: (
        F.normalize(grads[0], dim=1) @ F.normalize(grads[1], dim=1).T
    ),
    "diagonal": diagonal,
    "datainf": datainf,
    "influence-cg": gauss_newton,
    "influence-lissa": gauss_newton,
    "logra": blocks_of_gauss_newton,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", REFERENCES)
def test_scores_by_hand(method, kind):
    """In double precision, before they are rounded, and after; by one batch or several."""
    task, model, data, queries = case(kind)
    grads = [gradients_of(model, task, part) for part in (queries, data)]
    is_lissa, scale = method == "influence-lissa", 1 if method.startswith("grad-") else len(data)
    for batch_size in (len(data), 3):
        attributor = fitted(model, data, method, task=task, batch_size=batch_size, **EXACT[method])
        described = attributor._fitted[0].curvature.described()
        expected = REFERENCES[method](model, task, data, grads, EXACT[method].get("damping"), described)
        close_scores(exact_scores(attributor, queries), expected, 1e-4 if is_lissa else 1e-8)
        close_scores(attributor.attribute(queries).scores * scale, expected, 1e-4 if is_lissa else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_last_layer_by_hand(kind):
    task, model, data, queries = case(kind)
    last = {"words": "out", "pictures": "3"}.get(kind, "2")
    attribution = attributed(model, data, "last-layer", queries, task=task)
    grads = [gradients_of(model, task, part, layers=[last]) for part in (queries, data)]
    expected = gauss_newton(model, task, data, grads, 0.3, attribution.metadata["curvature"][0], [last]) / len(data)
    close_scores(attribution.scores, expected)
    assert torch.equal(
        attributed(model, data, "last-layer", queries, task=task, layers=[last]).scores, attribution.scores
    )


def test_last_layer_is_the_one_that_runs_last():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.runs_last, self.runs_first = nn.Linear(5, 3), nn.Linear(4, 5)
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.runs_last(torch.tanh(self.runs_first(x))))

    attributor = fitted(seeded(Backwards), points_for(), "last-layer", **EXACT["last-layer"])
    assert set(attributor.capture.parameters) == {"runs_last.weight", "runs_last.bias"}


#: What each damping is relative to: a sum of eigenvalues, and by how many it is divided.
@pytest.mark.parametrize("kind", ["points", "pictures"])
@pytest.mark.parametrize("method", ["diagonal", "ekfac", "influence-cg", "influence-lissa", "last-layer", "logra"])
def test_mean_eigenvalue(method, kind):
    kind = "classification" if kind == "points" else kind
    task, model, data, queries = case(kind)
    layers = ["3" if kind == "pictures" else "2"] if method == "last-layer" else None
    described = attributed(model, data, method, queries, task=task).metadata["curvature"][0]
    if method == "diagonal":
        mean = gradients_of(model, task, data).square().mean()
    else:
        sizes = [len(at) for at in blocks_of(model, layers).values()]
        ranks = {"ekfac": sum(sizes), "logra": sum(min(len(data), size) for size in sizes)}
        trace = gauss_newton_of(model, task, data, layers).trace()
        mean = trace / ranks.get(method, min(len(data), sum(sizes)))
    assert described["mean_eigenvalue"] == pytest.approx(float(mean), rel=1e-6)
    assert described["damping"] == pytest.approx(EXACT[method]["damping"] * float(mean), rel=1e-6)


# ---- TRAK -------------------------------------------------------------------------------------------------------


def margins_by_hand(model, task, data):
    """Features, weights of examples and weights of the kernel."""
    jacobians, derivatives = jacobians_of(model, data), second_derivatives(model, task, data)
    if isinstance(task, Classification | BinaryClassification):
        margins = [margin_of(task, model(x[None]), y[None]) for x, y in zip(*data.tensors, strict=True)]
        weights = (1 - torch.stack(margins).flatten().sigmoid()).detach()
        return gradients_of(model, task, data, margin_of), weights, weights * (1 - weights)
    residuals = (data.tensors[1].reshape(len(data), -1) - model(data.tensors[0])).detach() / task.noise_std**2
    sizes = residuals.norm(dim=1)
    directions = residuals / sizes[:, None]
    curved = torch.einsum("nc,ncd,nd->n", directions, derivatives, directions)
    return torch.einsum("nc,ncp->np", directions, jacobians), sizes, curved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["trak", "trak-newton"])
def test_trak_with_all_features(method, kind):
    """By the matrix where there are more examples than features, by the kernel where there are fewer."""
    task, model, data, queries = case(kind)
    (features, weights, curved), (query_features, *_) = (margins_by_hand(model, task, part) for part in (data, queries))
    kernel = features.T @ (curved[:, None] ** (method == "trak-newton") * features) / len(data)
    damping = 0.3 * kernel.trace() / min(kernel.shape[0], len(data))
    expected = query_features @ inverse_of(kernel, damping) @ features.T
    for batch_size in (len(data), 3):
        attributor = fitted(model, data, method, task=task, batch_size=batch_size, **EXACT[method])
        close_scores(exact_scores(attributor, queries), expected, 1e-8)
        attribution = attributor.attribute(queries)
        close_scores(attribution.scores, expected * weights / len(data))
        assert attribution.metadata["curvature"][0]["damping"] == pytest.approx(float(damping), rel=1e-5)
        (block,) = attributor._fitted[0].curvature._blocks.values()
        assert type(block).__name__ == ("DampedMatrix" if kind.startswith("more") else "DampedKernel")


def test_weights_of_the_kernel_take_no_pass_of_their_own():
    passes = {}
    for method in ("trak", "trak-newton"):
        model, seen = mlp(), []
        model.register_forward_hook(lambda module, args, outputs, seen=seen: seen.append(len(outputs)))
        fitted(model, points_for(), method)
        passes[method] = sum(seen)
    assert passes["trak-newton"] == passes["trak"]


def projection_matrix(attributor):
    """The map of an attributor as matrices ``(p, k)``, from what it does to the unit vectors of each block."""
    layouts = attributor.capture.layouts
    sizes = [layout.num_parameters for layout in layouts.values()]
    unit_vectors = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    blocks = {
        name: as_matrices(values, layout) if layout.way == "factors" else Block(values)
        for (name, layout), values in zip(layouts.items(), unit_vectors, strict=True)
    }
    return attributor._map(Gradients(blocks))


def as_matrices(values, layout):
    """Vectors of a block as sums of outer products with the columns of the identity."""
    rows = layout.shapes[0][0]
    matrices = values.view(len(values), rows, -1)
    columns = matrices.shape[2]
    right = torch.eye(columns, dtype=values.dtype).expand(len(values), columns, columns)
    return Block(None, (Outer(matrices.transpose(1, 2), right, rows),))


@pytest.mark.parametrize("dim", [7, 20])
def test_trak_projected(dim):
    task, model, data, queries = case("classification")
    attributor = fitted(model, data, "trak", projection_dim=dim, damping=0.3, task=task)
    project = projection_matrix(attributor)["all parameters"].dense()
    assert project.shape == (43, dim)
    (features, weights, _), (query_features, *_) = (margins_by_hand(model, task, part) for part in (data, queries))
    order = torch.cat([joined_places(model, name) for name in attributor.capture.layouts])
    features, query_features = features[:, order] @ project, query_features[:, order] @ project
    kernel = features.T @ features / len(data)
    damping = 0.3 * kernel.trace() / min(dim, len(data))
    expected = query_features @ inverse_of(kernel, damping) @ features.T * weights / len(data)
    close_scores(attributor.attribute(queries).scores, expected)


@pytest.mark.parametrize("dim", [2, 4])
def test_logra_projected(dim):
    task, model, data, queries = case("classification")
    attributor = fitted(model, data, "logra", projection_dim=dim, damping=0.3, task=task)
    matrices = projection_matrix(attributor)
    grads = [gradients_of(model, task, part) for part in (queries, data)]
    gauss_newton = gauss_newton_of(model, task, data)
    projected, start = {}, 0
    for name, layout in attributor.capture.layouts.items():
        of_layer = matrices[name].dense()[start : start + layout.num_parameters]
        start += layout.num_parameters
        at = joined_places(model, name)
        projected[name] = [g[:, at] @ of_layer for g in grads], of_layer.T @ gauss_newton[at][:, at] @ of_layer
        assert of_layer.shape == (len(at), min(dim, layout.shapes[0][0]) * min(dim, len(at) // layout.shapes[0][0]))
    ranks = sum(min(len(data), len(matrix)) for _, matrix in projected.values())
    damping = 0.3 * sum(float(matrix.trace()) for _, matrix in projected.values()) / ranks
    expected = sum(mine @ inverse_of(matrix, damping) @ theirs.T for (mine, theirs), matrix in projected.values())
    close_scores(attributor.attribute(queries).scores, expected / len(data))


def joined_places(model, name):
    """Places in a vector of all parameters, in the order of a block's matrix with the bias as its last column."""
    at, rows = blocks_of(model)[name], model.get_parameter(name).shape[0]
    weight = model.get_parameter(name).numel()
    return torch.cat([at[:weight].view(rows, -1), at[weight:].view(rows, -1)], 1).flatten()


def test_trak_over_models_averages_kernels_and_probabilities_by_themselves(tmp_path):
    task, _, data, queries = case("classification")
    kernels, weights = [], []
    for seed in range(2):
        model = mlp(seed=seed)
        (features, weight, _), (query_features, *_) = (margins_by_hand(model, task, part) for part in (data, queries))
        kernel = features.T @ features / len(data)
        damping = 0.3 * kernel.trace() / min(len(data), len(kernel))
        kernels.append(query_features @ inverse_of(kernel, damping) @ features.T / len(data))
        weights.append(weight)
    expected = torch.stack(kernels).mean(0) * torch.stack(weights).mean(0)
    attribution = attributed(mlp(seed=5), data, "trak", queries, checkpoints=save_weights(tmp_path), task=task)
    close_scores(attribution.scores, expected)
    assert [one["name"] for one in attribution.metadata["checkpoints"]] == ["0.pt", "1.pt"]


# ---- checkpoints ------------------------------------------------------------------------------------------------


def save_checkpoint(path, model, step, rates):
    """A Lightning checkpoint with one learning rate, or one for each parameter."""
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD([{"params": [(name, named[name])], "lr": rate} for name, rate in rates.items()])
    states = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    torch.save({**states, "global_step": step}, path)


RATES = {
    "one rate": [dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), rate) for rate in (0.5, 0.1, 0.02)],
    "rates by parameter": [
        {"0.weight": 0.5, "0.bias": 0.1, "2.weight": 0.3, "2.bias": 0.3},
        {"0.weight": 0.0, "0.bias": 0.2, "2.weight": 0.1, "2.bias": 0.4},
        {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.0, "2.bias": 0.0},
    ],
}


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("kind", TASKS)
def test_tracin(tmp_path, kind, rates):
    task, model, data, queries = case(kind)
    num_outputs, expected = TASKS[kind][1], 0.0
    for step, of_step in enumerate(rates):
        then = mlp(num_outputs=num_outputs, seed=step + 1)
        save_checkpoint(tmp_path / f"{step}.ckpt", then, step, of_step)
        factors = torch.cat([torch.full((p.numel(),), of_step[name]) for name, p in then.named_parameters()]).double()
        mine, theirs = (gradients_of(then, task, part) for part in (queries, data))
        expected = expected + mine * factors @ theirs.T
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attribution = attributed(model, data, "tracin", queries, task=task, record=tmp_path)
    close_scores(attribution.scores, expected)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    checkpoints = [tmp_path / f"{step}.ckpt" for step in (2, 0, 1)]
    close_scores(
        attributed(model, data, "tracin", queries, task=task, checkpoints=checkpoints).scores, attribution.scores
    )


def test_tracin_leaves_parameters_alone_that_no_optimizer_had(tmp_path):
    task, model, data, queries = case("classification")
    rates = {"2.weight": 0.3, "2.bias": 0.1}
    save_checkpoint(tmp_path / "a.ckpt", model, 1, rates)
    factors = torch.cat([torch.full((p.numel(),), rates.get(name, 0)) for name, p in model.named_parameters()]).double()
    mine, theirs = (gradients_of(model, task, part) for part in (queries, data))
    attribution = attributed(model, data, "tracin", queries, record=tmp_path)
    close_scores(attribution.scores, mine * factors @ theirs.T)


def test_tracin_without_checkpoints_or_rates(tmp_path):
    torch.save(mlp().state_dict(), tmp_path / "weights.pt")
    for options, message in (
        ({}, r"TracInCallback\(\).*`record=`"),
        ({"record": tmp_path}, r"needs learning rates.*weights\.pt holds none.*method='grad-dot'"),
        ({"record": tmp_path, "checkpoints": tmp_path}, "`record` and `checkpoints`"),
    ):
        with pytest.raises(ValueError, match=message):
            attributed(mlp(), points_for(), "tracin", **options)


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "datainf"])
def test_the_mean_over_checkpoints(tmp_path, method):
    _, _, data, queries = case("classification")
    single = [attributed(mlp(seed=seed), data, method, queries).scores for seed in range(2)]
    attribution = attributed(mlp(seed=7), data, method, queries, checkpoints=save_weights(tmp_path))
    close_scores(attribution.scores, torch.stack(single).mean(0))


# ---- what scores mean -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["influence-cg", "ekfac", "logra", "last-layer"])
def test_leaving_out_one_example_of_a_ridge_regression(method):
    """A linear model fitted in closed form, and again without each example: the sign and the size of every score."""
    num, size, ridge = 30, 2, 1.0
    x, query_x, truth = random_tensor(num, size, seed=0), random_tensor(8, size, seed=3), random_tensor(size, 1, seed=1)
    y = x @ truth + 0.3 * random_tensor(num, 1, seed=2)
    query_y = query_x @ truth + 0.3 * random_tensor(8, 1, seed=4)

    def solved(rows):
        matrix = x[rows].T @ x[rows] + num * ridge * torch.eye(size, dtype=x.dtype)
        return torch.linalg.solve(matrix, x[rows].T @ y[rows])

    def losses(weights):
        return (query_x @ weights - query_y).square()[:, 0] / 2

    everything = torch.arange(num)
    full = losses(solved(everything))
    change = torch.stack([losses(solved(everything[everything != i])) - full for i in range(num)], 1)
    model = nn.Linear(size, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(solved(everything).T)
    data, queries = TensorDataset(x, y), TensorDataset(query_x, query_y)
    damping = float(ridge / (x.T @ x / num).trace() * size)
    scores = attributed(model, data, method, queries, damping=damping).scores.double()
    assert correlation(scores, change) > 0.99
    large = change.abs() > 0.05 * change.abs().max()
    assert (scores.sign() == change.sign())[large].all()
    assert float(scores[large].abs().sum() / change[large].abs().sum()) == pytest.approx(1, abs=0.1)


def test_no_gradient_has_no_cosine():
    """An example that the model is sure of, to rounding."""
    model = mlp().float()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([300.0, 0, 0]))
    data = TensorDataset(points_for().tensors[0], torch.arange(14) % 2)
    scores = attributed(model, data, "grad-cos").scores
    assert scores.isfinite().all()
    assert (scores[::2] == 0).all()
    assert scores[1, 1] == pytest.approx(1)


# ---- options ----------------------------------------------------------------------------------------------------


def test_every_method_is_tested_here():
    made = {m for m in methods() if issubclass(Attributor.registry[m], GradientAttributor)}
    assert made == {*EXACT, "tracin"}


@pytest.mark.parametrize(
    ("method", "name"), [("trak", "projection_dim"), ("logra", "projection_dim"), ("grad-dot", "top_k")]
)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"])
def test_wrong_counts(method, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
        create(method, **{name: value})


@pytest.mark.parametrize("method", [m for m in EXACT if m not in ("grad-dot", "grad-cos")])
def test_wrong_damping(method):
    with pytest.raises(ValueError, match="`damping` must be a number of at least 0"):
        create(method, damping=-0.1)


def test_layers_must_be_a_list():
    with pytest.raises(TypeError, match=r"write layers=\['0'\]"):
        create("grad-dot", layers="0")


def test_records_are_of_others():
    with pytest.raises(ValueError, match="reads no record"):
        attributed(mlp(), points_for(), "ekfac", record="somewhere")


def test_several_logits_have_no_margin_and_use_the_loss():
    """Binary outputs that stand for several questions: TRAK takes the direction of the loss."""
    data = TensorDataset(points_for().tensors[0], torch.randint(2, (14, 3), generator=torch.Generator().manual_seed(0)))
    model, task = mlp(), BinaryClassification()
    scores = attributed(model, data, "trak", task=task).scores
    sizes = (data.tensors[1] - model(data.tensors[0]).detach().sigmoid()).norm(dim=1)
    features = -gradients_of(model, task, data, loss_of) / sizes[:, None]
    damping = 0.3 * features.square().sum() / 14 / 14
    inverse = torch.linalg.inv(features.T @ features / 14 + damping * torch.eye(43, dtype=torch.float64))
    close_scores(scores, features @ inverse @ features.T * sizes / 14)
