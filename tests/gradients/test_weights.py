"""Factors, weights, smoothing and ignored targets in gradients and curvature, against torch's own losses."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import BinaryClassification, Classification, PoissonRegression, Regression
from stride_lightning.attribute import attribute
from stride_lightning.tasks.parts import Parts
from tests.helpers.gradient_models import QUIET, fitted, inverse_of, jacobians_of, mlp
from tests.helpers.tiny import random_tensor

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
NUM = 14
X = random_tensor(NUM, 4, seed=0)
CLASSES = torch.arange(NUM) % 3
IGNORED = CLASSES.where(torch.arange(NUM) % 5 > 0, -100)
WEIGHTS = torch.tensor([0.2, 1.0, 3.0]).double()
OF_EXAMPLES = random_tensor(NUM, seed=7).abs()
OF_EXAMPLES[3] = 0
BITS = (random_tensor(NUM, 3, seed=3) > 0).double()
NUMBERS, SOFT = random_tensor(NUM, 2, seed=4), random_tensor(NUM, 3, seed=5).softmax(1)
COUNTS = (random_tensor(NUM, 2, seed=6).abs() * 3).floor()
PARTS = Parts((0,), 1, 2)


def cross_entropy(o, y, **options):
    return F.cross_entropy(o, y, reduction="none", **options)


def bits(o, y, **options):
    return F.binary_cross_entropy_with_logits(o, y, reduction="none", **options).sum(1)


def squares(o, y):
    return (o - y).square().sum(1) / 2


#: A task, its targets (and weights), and the loss of every example by torch.
CASES = {
    "factor": (Classification().with_scale(0.3), (CLASSES,), lambda o, y: 0.3 * cross_entropy(o, y)),
    "factor of bits": (BinaryClassification().with_scale(0.25), (BITS,), lambda o, y: 0.25 * bits(o, y)),
    "factor of squares": (Regression().with_scale(0.25), (NUMBERS,), lambda o, y: 0.25 * squares(o, y)),
    "class weights": (
        Classification(class_weights=WEIGHTS),
        (CLASSES,),
        lambda o, y: cross_entropy(o, y, weight=WEIGHTS) / WEIGHTS[CLASSES].mean(),
    ),
    "class weights that are not divided by": (
        Classification(class_weights=WEIGHTS, normalised=False),
        (CLASSES,),
        lambda o, y: cross_entropy(o, y, weight=WEIGHTS),
    ),
    "smoothing": (
        Classification(label_smoothing=0.2),
        (CLASSES,),
        lambda o, y: cross_entropy(o, y, label_smoothing=0.2),
    ),
    "weights, smoothing, ignored": (
        Classification(class_weights=WEIGHTS, label_smoothing=0.2, ignore_index=-100),
        (IGNORED,),
        lambda o, y: (
            cross_entropy(o, y, weight=WEIGHTS, label_smoothing=0.2)
            / WEIGHTS[IGNORED.clamp(0)].where(IGNORED >= 0, 0).mean()
        ),
    ),
    "ignored": (
        Classification(ignore_index=-100),
        (IGNORED,),
        lambda o, y: cross_entropy(o, y) / (IGNORED >= 0).double().mean(),
    ),
    "soft labels": (Classification(soft_labels=True), (SOFT,), cross_entropy),
    "positive weight": (
        BinaryClassification(pos_weight=3.0),
        (BITS[:, 0],),
        lambda o, y: bits(o, y[:, None], pos_weight=torch.tensor([3.0]).double()),
    ),
    "positive weights": (
        BinaryClassification(pos_weight=[3, 1, 0.5]),
        (BITS,),
        lambda o, y: bits(o, y, pos_weight=torch.tensor([3, 1, 0.5]).double()),
    ),
    "counts": (
        PoissonRegression().with_scale(0.5),
        (COUNTS,),
        lambda o, y: F.poisson_nll_loss(o, y, reduction="none").mean(1),
    ),
    "examples of counts": (
        PoissonRegression().changed(parts=PARTS, is_normalised=True),
        (COUNTS, OF_EXAMPLES),
        lambda o, y, w: w * F.poisson_nll_loss(o, y, reduction="none").sum(1) / OF_EXAMPLES.mean(),
    ),
    "examples of classes": (
        Classification().changed(parts=PARTS),
        (CLASSES, OF_EXAMPLES),
        lambda o, y, w: w * cross_entropy(o, y),
    ),
    "examples of classes, divided by": (
        Classification().changed(parts=PARTS, is_normalised=True),
        (CLASSES, OF_EXAMPLES),
        lambda o, y, w: w * cross_entropy(o, y) / OF_EXAMPLES.mean(),
    ),
    "examples of bits": (
        BinaryClassification().changed(parts=PARTS),
        (BITS, OF_EXAMPLES),
        lambda o, y, w: w * bits(o, y),
    ),
    "examples of numbers": (
        Regression().changed(parts=PARTS, is_normalised=True),
        (NUMBERS, OF_EXAMPLES),
        lambda o, y, w: w * squares(o, y) / OF_EXAMPLES.mean(),
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case):
    """Model, task, data, and outputs and losses of every example."""
    task, targets, loss = CASES[case]
    width = 3 if not targets[0].is_floating_point() else 1 if targets[0].ndim == 1 else targets[0].shape[1]
    return mlp(num_outputs=width), task, TensorDataset(X, *targets), lambda o: loss(o, *targets)


def gradients_of(model, losses):
    with torch.enable_grad():
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses(model(X))]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def gauss_newton_of(model, losses, data):
    with torch.no_grad():
        outputs = model(X)
    hessians = []
    for i in range(NUM):
        hessian = torch.autograd.functional.hessian(
            lambda o, i=i: losses(torch.cat([outputs[:i], o, outputs[i + 1 :]]))[i], outputs[i : i + 1]
        )
        hessians.append(hessian.reshape(outputs.shape[1], outputs.shape[1]))
    jacobians = jacobians_of(model, data)
    return torch.einsum("ncp,ncd,ndq->pq", jacobians, torch.stack(hessians), jacobians) / NUM


@every_case
def test_grad_dot_is_that_of_the_loss(case):
    model, task, data, losses = made(case)
    scores = attribute(model, data, train_data=data, task=task, method="grad-dot", batch_size=5, **QUIET).scores
    gradients = gradients_of(model, losses)
    expected = gradients @ gradients.T
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@every_case
def test_conjugate_gradients_have_the_curvature_of_the_loss(case):
    model, task, data, losses = made(case)
    options = {"damping": 0.3, "tolerance": 1e-10, "task": task, "batch_size": 5}
    attributor = fitted(model, data, "influence-cg", **options)
    scores = attributor.attribute(data).scores.double() * NUM
    gradients, damping = gradients_of(model, losses), attributor._fitted[0].curvature.absolute_damping
    expected = gradients @ inverse_of(gauss_newton_of(model, losses, data), damping) @ gradients.T
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@every_case
def test_margins_times_their_weights_are_the_loss(case):
    model, task, data, losses = made(case)
    attributor = fitted(model, data, "grad-dot", task=task)
    gradients = gradients_of(model, losses)
    for batch in attributor.reader.run():
        margins, weights, curvature = batch.margin(), batch.margin_weights, batch.margin_curvature
        gram = margins.inner(margins) * weights[:, None] * weights
        torch.testing.assert_close(gram, gradients @ gradients.T, rtol=1e-6, atol=1e-6)
        assert (curvature >= 0).all()
        assert (curvature[gradients.abs().sum(1) == 0] == 0).all()


@every_case
@pytest.mark.parametrize("method", ["ekfac", "trak", "diagonal", "logra", "stride", "information-loss"])
def test_every_method_takes_them(case, method):
    model, task, data, _ = made(case)
    if method == "stride" and case == "examples of numbers":
        with pytest.raises(ValueError, match="A readout is not refit to a regression with weights of examples"):
            attribute(model, data, train_data=data, task=task, method=method, **QUIET)
        return
    attribution = attribute(model, data, train_data=data, task=task, method=method, **QUIET)
    assert attribution.scores.isfinite().all()
    assert attribution.scores.abs().max() > 0
    weights = data.tensors[-1] if len(data.tensors) == 3 else (data.tensors[1].reshape(NUM, -1)[:, 0] != -100).double()
    assert (attribution.scores[:, weights == 0] == 0).all()


def test_predictions_are_targets_of_weight_one_within_their_class():
    model, task, data, _ = made("class weights")
    predicted = attribute(model, data, train_data=data, task=task, method="grad-dot", target="predicted", **QUIET)
    answers = TensorDataset(X, model(X).argmax(1))
    given = attribute(model, answers, train_data=data, task=task, method="grad-dot", **QUIET)
    torch.testing.assert_close(predicted.scores, given.scores)


def test_targets_are_shown_as_the_data_set_has_them():
    for case in ("class weights", "weights, smoothing, ignored", "positive weights", "examples of numbers"):
        model, task, data, _ = made(case)
        attribution = attribute(model, data, train_data=data, task=task, method="grad-dot", **QUIET)
        shown, targets = attribution.train_targets, data.tensors[1]
        counted = data.tensors[2] > 0 if len(data.tensors) == 3 else slice(None)
        torch.testing.assert_close(shown[counted].to(targets), targets[counted])
