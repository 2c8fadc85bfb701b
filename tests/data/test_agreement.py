"""Losses that are taken for a likelihood, and those that are not; and the price of the check."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stride_lightning import BinaryClassification, Classification, Regression
from stride_lightning.data.agreement import Agreement, agree
from stride_lightning.data.examples import Examples
from stride_lightning.data.step_gradients import SKETCH
from stride_lightning.data.trials import spread_places
from stride_lightning.tasks.own_loss import OwnLoss
from stride_lightning.tasks.training_step import Moment, TrainingStep
from tests.helpers.tiny import CPU, examples_of, perceptron, random_tensor

NUM = 120
X = random_tensor(NUM, 5, seed=0).float()
CLASSES = (X @ random_tensor(5, 3, seed=1).float()).argmax(1)
NUMBERS = torch.stack([X[:, 0] * 2 + 1, X[:, 1] - X[:, 2]], 1) + 0.3 * random_tensor(NUM, 2, seed=2).float()
BITS = (X[:, :4] + 0.5 * random_tensor(NUM, 4, seed=3).float() > 0).float()
WEIGHTS = torch.tensor([0.2, 1.0, 5.0])

Loss = Callable[[Tensor, Tensor], Tensor]


class Module(L.LightningModule):
    """A network whose training_step is ``loss(module, outputs, targets)``."""

    def __init__(self, loss: Callable[..., Tensor], width: int = 3, num_inputs: int = 5) -> None:
        super().__init__()
        self.loss, self.net, self.calls = loss, perceptron(num_inputs, width), 0
        self.head, self.temperature = nn.Linear(width, width), nn.Parameter(torch.tensor(1.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, self(batch[0]), *batch[1:])


def of_module(model: nn.Module, *tensors: Tensor, batch_size: int = 64, moment: Moment | None = None) -> Agreement:
    return agree(model, examples_of(*tensors), CPU, OwnLoss().of(model, moment), batch_size=batch_size)


def agreed(loss: Callable[..., Tensor], *data: Tensor, width: int = 3) -> Agreement:
    return of_module(Module(loss, width), *data)


# ---- losses that look like a likelihood and are none ----------------------------------------------------------


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def scaled_by_its_difficulty(_: Module, o: Tensor, y: Tensor) -> Tensor:
    losses = cross_entropies(o, y)
    return (losses * (1 + losses.detach())).mean()


def clipped(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return cross_entropies(o, y).clamp(max=4).mean()


def margin_added(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o - 0.3 * F.one_hot(y, 3), y)


def constant_temperature(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o / 0.7, y)


def learnt_temperature(module: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o / module.temperature, y)


def head_in_the_step(module: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.head(o), y)


def focal(_: Module, o: Tensor, y: Tensor) -> Tensor:
    losses = cross_entropies(o, y)
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def softmax_twice(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o.softmax(1), y)


def label_noise(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, torch.where(torch.arange(len(y)) % 7 == 0, (y + 1) % 3, y))


def auxiliary(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y) + 0.01 * o.square().mean()


def confidence_penalty(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y) - 0.1 * torch.distributions.Categorical(logits=o).entropy().mean()


def smoothing_of_one_class(_: Module, o: Tensor, y: Tensor) -> Tensor:
    smooth = F.cross_entropy(o, y, reduction="none", label_smoothing=0.1)
    return torch.where(y == 1, smooth, cross_entropies(o, y)).mean()


def multi_margin(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.multi_margin_loss(o, y)


def root_of_the_size(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return cross_entropies(o, y).sum() / len(y) ** 0.5


def size_plus_one(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return cross_entropies(o, y).sum() / (len(y) + 1)


def hardest_half(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return cross_entropies(o, y).topk((len(y) + 1) // 2).values.mean()


def weights_by_row(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return cross_entropies(o, y) @ torch.linspace(1, 2, len(y)) / len(y)


def weights_by_the_batch(_: Module, o: Tensor, y: Tensor) -> Tensor:
    counts = torch.bincount(y, minlength=3).clamp(min=1)
    return (cross_entropies(o, y) / counts[y]).sum()


def centred_by_the_batch(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o - o.mean(0), y)


def batch_normalised_outputs(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(o, dim=1), y)


def another_target(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, (y + 1) % 3)


def generalised_cross_entropy(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return ((1 - o.softmax(1)[torch.arange(len(y)), y] ** 0.7) / 0.7).mean()


def brier(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(o.softmax(1), F.one_hot(y, 3).float())


def random_factor(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y) * torch.rand(())


def coin(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y) if random.random() < 0.9 else F.cross_entropy(2 * o, y)


OF_CLASSES = [
    *(scaled_by_its_difficulty, clipped, margin_added, constant_temperature, learnt_temperature, head_in_the_step),
    *(focal, softmax_twice, label_noise, auxiliary, confidence_penalty, smoothing_of_one_class, multi_margin),
    *(root_of_the_size, size_plus_one, hardest_half, weights_by_row, weights_by_the_batch, centred_by_the_batch),
    *(batch_normalised_outputs, another_target, generalised_cross_entropy, brier, random_factor, coin),
]


@pytest.mark.parametrize("loss", OF_CLASSES)
def test_losses_of_classes_that_are_no_likelihood(loss: Callable[..., Tensor]) -> None:
    agreement = agreed(loss, X, CLASSES)
    assert agreement.task is None
    assert "another loss than a classification" in agreement.reason


def huber(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.huber_loss(o, y, delta=3.0)  # a square of all residuals at the weights


def standardised(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(o, (y - 0.3) / 1.7)


def shifted(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(o, y - 0.05)


def log_cosh(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return torch.log(torch.cosh(o - y)).mean()


def root_of_the_mean(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(o, y).sqrt()


def columns_weighted(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return ((o - y).square() * torch.tensor([1.0, 1.5])).mean()


def squashed(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(torch.tanh(o), y)


def relative_error(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return ((o - y).square() / (1 + y.abs())).mean()


def residual_weighted(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return ((o - y).square() * (1 + 0.05 * (o - y).detach().abs())).mean()


def absolute(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.l1_loss(o, y)


def quantile(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(0.9 * (y - o), -0.1 * (y - o)).mean()


def clipped_square(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return (o - y).square().clamp(max=50).mean()


@pytest.mark.parametrize(
    "loss",
    [
        *(huber, standardised, shifted, log_cosh, root_of_the_mean, columns_weighted, squashed, relative_error),
        *(residual_weighted, absolute, quantile, clipped_square),
    ],
)
def test_losses_of_numbers_that_are_no_likelihood(loss: Callable[..., Tensor]) -> None:
    agreement = agreed(loss, X, NUMBERS, width=2)
    assert agreement.task is None
    assert "another loss than a regression" in agreement.reason


def squared_hinge(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.relu(1 - (2 * y - 1) * o).square().mean()


def dice(_: Module, o: Tensor, y: Tensor) -> Tensor:
    p = o.sigmoid()
    return F.binary_cross_entropy_with_logits(o, y) + 1 - 2 * (p * y).sum() / (p.sum() + y.sum())


def smooth_bits(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(o, 0.9 * y + 0.05)


def squares_of_probabilities(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(o.sigmoid(), y)


@pytest.mark.parametrize("loss", [squared_hinge, dice, smooth_bits, squares_of_probabilities])
def test_losses_of_bits_that_are_no_likelihood(loss: Callable[..., Tensor]) -> None:
    agreement = agreed(loss, X, BITS, width=4)
    assert agreement.task is None


@pytest.mark.parametrize(("loss", "data", "width"), [(focal, CLASSES, 3), (clipped_square, NUMBERS, 2)])
def test_heads_that_start_at_zero_hide_no_loss(loss: Callable[..., Tensor], data: Tensor, width: int) -> None:
    # With outputs of zero the gradient of the focal loss is a multiple of that of cross-entropy.
    model = Module(loss, width)
    for parameter in model.net[-1].parameters():
        nn.init.zeros_(parameter)
    assert of_module(model, X, data).task is None


def test_losses_of_outputs_that_differ_in_training_are_not_taken() -> None:
    class Heads(Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.net(x) if self.training else self.net(x)

    assert of_module(Heads(lambda _, o, y: F.cross_entropy(o, y)), X, CLASSES).task is None


def test_weights_of_a_loss_that_has_another_one_for_a_rare_class_are_seen() -> None:
    classes = CLASSES.clone()
    classes[classes == 2] = 0
    classes[spread_places(NUM)[100]] = 2  # one example in 120, which is not among the first that are read
    weights = torch.tensor([1.0, 1.0, 3.0])
    agreement = agreed(lambda _, o, y: F.cross_entropy(o, y, weights, reduction="none").mean(), X, classes)
    assert agreement.task is not None
    torch.testing.assert_close(agreement.task.class_weights * agreement.task.scale, weights.double())


# ---- likelihoods in disguise ------------------------------------------------------------------------------------


def log_softmax_and_nll(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(o, 1), y)


def module_of_torch(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return nn.CrossEntropyLoss()(o, y)


def sum_over_size(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y, reduction="sum") / len(y)


def own_logsumexp(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return (o.exp().sum(1).log() - o[torch.arange(len(y)), y]).mean()


def inner_product(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return -(F.one_hot(y, 3) * o.log_softmax(1)).sum() / len(y)


def floats_cast(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y.long())


def none_then_mean(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y, reduction="none").mean()


def distribution(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return -torch.distributions.Categorical(logits=o).log_prob(y).mean()


def logits_shifted(_: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o - o.max(1, keepdim=True).values.detach(), y)


def with_a_penalty_on_weights(module: Module, o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y) + 0.01 * sum(p.square().sum() for p in module.parameters())


@pytest.mark.parametrize(
    ("loss", "data"),
    [
        *((loss, CLASSES) for loss in (log_softmax_and_nll, module_of_torch, sum_over_size, own_logsumexp)),
        *((loss, CLASSES) for loss in (inner_product, none_then_mean, distribution, logits_shifted)),
        (with_a_penalty_on_weights, CLASSES),
        (floats_cast, CLASSES.float()),
        (floats_cast, CLASSES.to(torch.uint8)),
    ],
)
def test_cross_entropy_in_disguise(loss: Callable[..., Tensor], data: Tensor) -> None:
    agreement = agreed(loss, X, data)
    assert repr(agreement.task) == "Classification()"
    assert agreement.reason == "Classification() agrees with training_step: 1 times its mean over examples"


@pytest.mark.parametrize(
    ("loss", "noise_std"),
    [
        (lambda _, o, y: F.mse_loss(o, y), 1.0),
        (lambda _, o, y: (o - y).pow(2).mean(), 1.0),
        (lambda _, o, y: 0.5 * (o - y).square().sum() / len(y), 1.0),
        (lambda _, o, y: (o - y).square().sum(1).mean(), math.sqrt(0.5)),
        (lambda _, o, y: nn.MSELoss()(y, o) * 8, math.sqrt(1 / 8)),
        (lambda _, o, y: F.gaussian_nll_loss(o, y, torch.full_like(o, 4.0)), math.sqrt(8)),
        (lambda _, o, y: -torch.distributions.Normal(o, 2.0).log_prob(y).sum(1).mean(), 2.0),
        (lambda _, o, y: F.huber_loss(o, y, delta=1e6), math.sqrt(2)),
    ],
)
def test_squares_in_disguise_have_the_unit_of_the_loss(loss: Callable[..., Tensor], noise_std: float) -> None:
    agreement = agreed(loss, X, NUMBERS, width=2)
    assert isinstance(agreement.task, Regression)
    assert agreement.task.noise_std == pytest.approx(noise_std, rel=3e-5)


@pytest.mark.parametrize("shape", [(NUM,), (NUM, 1)])
def test_one_number_per_example(shape: tuple[int, ...]) -> None:
    model = Module(lambda _, o, y: F.mse_loss(o.squeeze(1), y.reshape(-1)), 1)
    agreement = of_module(model, X, NUMBERS[:, 0].reshape(shape))
    assert isinstance(agreement.task, Regression)
    assert agreement.task.noise_std == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("loss", "scale"),
    [
        (lambda _, o, y: F.binary_cross_entropy_with_logits(o, y), 0.25),
        (lambda _, o, y: nn.BCEWithLogitsLoss()(o, y), 0.25),
        (lambda _, o, y: (F.softplus(o) - y * o).sum(1).mean(), 1.0),
        (lambda _, o, y: F.binary_cross_entropy(o.sigmoid().clamp(1e-12), y), 0.25),
        (lambda _, o, y: F.multilabel_soft_margin_loss(o, y), 0.25),
    ],
)
def test_several_bits_in_disguise(loss: Callable[..., Tensor], scale: float) -> None:
    agreement = agreed(loss, X, BITS, width=4)
    assert repr(agreement.task) == f"BinaryClassification({'' if scale == 1 else 'scale=0.25'})"


def test_one_bit_as_a_float() -> None:
    model = Module(lambda _, o, y: F.binary_cross_entropy_with_logits(o[:, 0], y), 1)
    assert repr(of_module(model, X, BITS[:, 0]).task) == "BinaryClassification()"


def test_bits_that_are_numbers_to_the_loss() -> None:
    assert repr(agreed(lambda _, o, y: F.mse_loss(o, y) / 2, X, BITS, width=4).task) == "Regression(noise_std=2)"


# ---- factors, weights and smoothing -----------------------------------------------------------------------------


def test_factors_are_kept_and_sums_are_said() -> None:
    half = agreed(lambda _, o, y: 0.5 * F.cross_entropy(o, y), X, CLASSES)
    assert repr(half.task) == "Classification(scale=0.5)"
    summed = agreed(lambda _, o, y: F.mse_loss(o, y, reduction="sum"), X, NUMBERS, width=2)
    assert repr(summed.task) == "Regression(noise_std=0.707107)"
    assert "sum over examples" in summed.reason


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [None, -100, -1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_weights_smoothing_and_ignored_targets_are_read_off(
    smoothing: float, ignored: int | None, weights: Tensor | None
) -> None:
    targets = CLASSES.clone()
    if ignored is not None:
        targets[::5] = ignored
    options: dict[str, Any] = {"label_smoothing": smoothing, "ignore_index": -100 if ignored is None else ignored}
    agreement = agreed(lambda _, o, y: F.cross_entropy(o, y, weights, **options), X, targets)
    task = agreement.task
    assert isinstance(task, Classification)
    assert (task.label_smoothing, task.ignore_index, task.scale) == (smoothing, ignored, 1)
    assert task.is_normalised == (weights is not None or ignored is not None)
    if weights is not None:
        torch.testing.assert_close(task.class_weights, (weights / weights.max()).double())


def test_weights_that_training_does_not_divide_by() -> None:
    loss = lambda _, o, y: F.cross_entropy(o, y, WEIGHTS, reduction="none").mean()  # noqa: E731
    task = agreed(loss, X, CLASSES).task
    assert repr(task) == "Classification(class_weights=[0.04, 0.2, 1], normalised=False, scale=5)"


def test_weights_are_not_guessed_for_a_class_that_was_not_seen() -> None:
    model = Module(lambda _, o, y: F.cross_entropy(o, y, torch.tensor([0.2, 1.0, 5.0, 2.0])), 4)
    assert of_module(model, X, CLASSES).task is None
    model.loss = lambda _, o, y: F.cross_entropy(o, y)
    for count in (NUM, 48, 3):
        assert repr(of_module(model, X[:count], CLASSES[:count]).task) == "Classification()"


@pytest.mark.parametrize("weights", [[3.0], [2.0, 3.0, 4.0, 1.0]])
def test_weights_of_positive_targets(weights: list[float]) -> None:
    pos_weight = torch.tensor(weights)
    agreement = agreed(
        lambda _, o, y: F.binary_cross_entropy_with_logits(o, y, pos_weight=pos_weight), X, BITS, width=4
    )
    assert isinstance(agreement.task, BinaryClassification)
    assert agreement.task.pos_weight.tolist() == weights
    assert agreement.task.scale == 0.25


EXAMPLE_WEIGHTS = random_tensor(NUM, seed=5).abs().float()


@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize(
    ("losses", "targets", "width"),
    [
        (cross_entropies, CLASSES, 3),
        (lambda o, y: (o - y).square().sum(1) / 2, NUMBERS, 2),
        (lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="none").sum(1), BITS, 4),
    ],
)
def test_weights_of_examples_in_the_batch(losses: Loss, targets: Tensor, width: int, is_normalised: bool) -> None:
    def loss(_: Module, o: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return losses(o, y) @ w / (w.sum() if is_normalised else len(w))

    task = agreed(loss, X, targets, EXAMPLE_WEIGHTS, width=width).task
    assert task is not None
    assert (task.parts.weights, task.is_normalised, task.dispersion) == (2, is_normalised, 1)


def test_soft_labels() -> None:
    soft = random_tensor(NUM, 3, seed=6).float().softmax(1)
    assert repr(agreed(lambda _, o, y: F.cross_entropy(o, y), X, soft).task) == "Classification(soft_labels=True)"
    assert repr(agreed(lambda _, o, y: F.mse_loss(o, y), X, soft).task) == "Regression(noise_std=1.22474)"
    assert agreed(lambda _, o, y: F.kl_div(o.log_softmax(1), y, reduction="batchmean"), X, soft).task is not None


# ---- where the parts of a batch stand -----------------------------------------------------------------------------


class Dicts(torch.utils.data.Dataset):
    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return dict(zip(self.names, (X[i], CLASSES[i]), strict=True))


def test_dictionaries_are_read_by_trying() -> None:
    class OfDicts(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["image"]), batch["label"])

    model = OfDicts(lambda: None)
    agreement = agree(model, Examples(Dicts("image", "label")), CPU, OwnLoss().of(model), batch_size=32)
    assert repr(agreement.task) == "Classification(inputs batch['image'], targets batch['label'])"
    task, batch = agreement.task, {"image": X[:4], "label": CLASSES[:4]}
    assert task is not None
    assert torch.equal(task.targets(batch), CLASSES[:4])
    assert torch.equal(task.outputs(model, task.inputs(batch)), model(X[:4]))


def test_two_inputs_and_a_target() -> None:
    class Two(Module):
        def forward(self, one: Tensor, other: Tensor | None = None) -> Tensor:
            return self.net(one if other is None else one + other.abs())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0], batch[1]), batch[2])

    task = of_module(Two(lambda: None), X, X.flip(0), CLASSES).task
    assert repr(task) == "Classification(inputs batch[0], batch[1], targets batch[2])"


class Pairs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return NUM

    def __getitem__(self, i: int) -> Any:
        return (X[i, :2], X[i, 2:]), CLASSES[i]


def test_two_inputs_in_a_tuple() -> None:
    class Two(Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return self.net(torch.cat([one, other], 1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(*batch[0]), batch[1])

    model = Two(lambda: None)
    task = agree(model, Examples(Pairs()), CPU, OwnLoss().of(model), batch_size=64).task
    assert repr(task) == "Classification(inputs batch[0][0], batch[0][1], targets batch[1])"


def test_a_forward_that_takes_the_whole_dictionary() -> None:
    class Whole(Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(batch["image"])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch), batch["label"])

    model = Whole(lambda: None)
    task = agree(model, Examples(Dicts("image", "label")), CPU, OwnLoss().of(model), batch_size=64).task
    assert repr(task) == "Classification(inputs batch, targets batch['label'])"


@pytest.mark.parametrize("data", [(X,), (X, CLASSES)])
def test_autoencoders_have_their_inputs_as_targets(data: tuple[Tensor, ...]) -> None:
    class Autoencoder(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0]), batch[0])

    task = of_module(Autoencoder(lambda: None, 5), *data).task
    assert repr(task) == "Regression(noise_std=1.58114, inputs batch[0], targets batch[0])"


# ---- bad modules, bad data, and the price -------------------------------------------------------------------------


def probabilities(self: Module, x: Tensor) -> Tensor:
    return self.net(x).softmax(1)


def a_tuple(self: Module, x: Tensor) -> Any:
    return self.net(x), x


def a_dict(self: Module, x: Tensor) -> Any:
    return {"logits": self.net(x)}


@pytest.mark.parametrize(("forward", "output"), [(a_tuple, 0), (a_dict, "logits")])
def test_outputs_among_others(forward: Callable[..., Any], output: object) -> None:
    kind = type("Other", (Module,), {"forward": forward})
    kind.training_step = lambda self, batch, i: F.cross_entropy(self(batch[0])[output], batch[1])
    model = kind(lambda: None)
    task = of_module(model, X, CLASSES).task
    assert repr(task) == f"Classification(inputs batch[0], targets batch[1], outputs [{output!r}])"
    assert task is not None
    assert torch.equal(task.outputs(model, task.inputs((X, CLASSES))), model.net(X))


def two_arguments(self: Module, x: Tensor, other: Tensor) -> Tensor:
    return self.net(x + other)


def fails(self: Module, x: Tensor) -> Tensor:
    raise KeyError("nothing")


@pytest.mark.parametrize("forward", [probabilities, two_arguments, fails])
def test_modules_whose_outputs_are_no_natural_parameters(forward: Callable[..., Any]) -> None:
    kind = type("Other", (Module,), {"forward": forward})
    kind.training_step = lambda self, batch, i: F.cross_entropy(self.net(batch[0]), batch[1])
    agreement = of_module(kind(lambda: None), X, CLASSES)
    assert agreement.task is None
    assert agreement.reason


def test_modules_without_a_forward() -> None:
    class NoForward(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.zeros((), requires_grad=True)

    agreement = of_module(NoForward(), X, CLASSES)
    assert agreement.task is None
    assert "defines no `forward`" in agreement.reason


@pytest.mark.parametrize("value", [None, torch.ones(3), "loss", RuntimeError])
def test_steps_that_give_no_loss(value: object) -> None:
    def loss(*_: object) -> Any:
        if value is RuntimeError:
            raise RuntimeError("no loss today")
        return value

    agreement = agreed(loss, X, CLASSES)
    assert agreement.task is None
    assert agreement.reason


def test_modules_and_losses_that_cannot_be_compared() -> None:
    frozen = Module(lambda _, o, y: F.cross_entropy(o, y)).requires_grad_(False)
    assert "no trainable parameter" in of_module(frozen, X, CLASSES).reason
    assert "skips every batch" in agreed(lambda *_: None, X, CLASSES).reason
    infinite = lambda _, o, y: F.cross_entropy(o, y) * torch.inf  # noqa: E731
    assert agreed(infinite, X, CLASSES).reason


def test_an_example_that_is_not_finite_is_named() -> None:
    inputs = X.clone()
    inputs[7] = torch.nan
    with pytest.raises(ValueError, match="Example 7 has NaN in its outputs"):
        of_module(Module(lambda _, o, y: F.cross_entropy(o, y), 3), inputs[:20], CLASSES[:20])


def test_a_module_without_a_training_step_is_read_by_its_shapes() -> None:
    agreement = agree(perceptron(5, 3), examples_of(X, CLASSES), CPU, None, batch_size=64)
    assert repr(agreement.task) == "Classification()"
    assert "no training_step" in agreement.reason
    with pytest.raises(ValueError, match="No built-in task has"):
        agree(perceptron(5, 3), examples_of(X, NUMBERS), CPU, None, batch_size=64)


class Counting(TrainingStep):
    sizes: list[int]

    def __call__(self, batch: Any, keys: Tensor | None = None, draw: int = 0) -> Tensor | None:
        self.sizes.append(len(batch[0]))
        return super().__call__(batch, keys, draw)


@pytest.mark.parametrize("loss", [lambda _, o, y: F.cross_entropy(o, y), focal])
def test_at_most_twelve_steps_of_64_examples_of_several_sizes(loss: Callable[..., Tensor]) -> None:
    model = Module(loss)
    step = Counting(model)
    step.sizes = []
    agree(model, examples_of(X, CLASSES), CPU, step, batch_size=256)
    assert len(step.sizes) <= 12
    assert max(step.sizes) == 64
    assert set(step.sizes) == {64, 16, 5, 1}


def test_nothing_changes_to_the_bit() -> None:
    model = Module(lambda _, o, y: F.cross_entropy(F.dropout(o, 0.5), y)).train()
    model.net.append(nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert of_module(model, X, CLASSES).task is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())


def test_dropout_and_batch_norm_are_in_eval_mode() -> None:
    model = Module(lambda _, o, y: F.cross_entropy(o, y)).train()
    model.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    assert repr(of_module(model, X, CLASSES).task) == "Classification()"


@pytest.mark.parametrize("size", [1, 2, 7])
def test_few_examples(size: int) -> None:
    assert agreed(lambda _, o, y: F.mse_loss(o, y), X[:size], NUMBERS[:size], width=2).task is not None
    assert agreed(huber, X[:size], NUMBERS[:size], width=2).task is None


def test_double_and_half_precision() -> None:
    data = X.double(), CLASSES
    assert of_module(Module(lambda _, o, y: F.cross_entropy(o, y)).double(), *data).task is not None
    assert of_module(Module(focal).double(), *data).task is None


# ---- counts, places and texts -----------------------------------------------------------------------------------

COUNTS = torch.poisson(X[:, :2].clamp(-1, 1).exp() * 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda _, o, y: F.poisson_nll_loss(o, y), "PoissonRegression(scale=0.5)"),
        (lambda _, o, y: F.poisson_nll_loss(o, y, full=True), "PoissonRegression(scale=0.5)"),
        (lambda _, o, y: (o.exp() - y * o).sum(1).mean(), "PoissonRegression()"),
        (lambda _, o, y: -torch.distributions.Poisson(o.exp()).log_prob(y).mean(), "PoissonRegression(scale=0.5)"),
        (lambda _, o, y: F.mse_loss(o, y), "Regression(noise_std=1)"),
        (lambda _, o, y: F.poisson_nll_loss(F.softplus(o), y, log_input=False), "None"),
        (lambda _, o, y: F.mse_loss(o, y.log1p()), "None"),
    ],
)
def test_counts(loss: Callable[..., Tensor], expected: str) -> None:
    assert repr(agreed(loss, X, COUNTS, width=2).task) == expected


class Pictures(Module):
    def __init__(self, loss: Callable[..., Tensor], width: int = 3) -> None:
        super().__init__(loss, width)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, width, 1))


PICTURES = random_tensor(NUM, 1, 4, 4, seed=8).float()
MASKS = torch.bucketize(PICTURES[:, 0], torch.tensor([-0.5, 0.5]))
HOLES = MASKS.masked_fill(random_tensor(NUM, 4, 4, seed=9) > 0.8, -100)


@pytest.mark.parametrize(
    ("loss", "masks", "expected"),
    [
        (lambda _, o, y: F.cross_entropy(o, y), MASKS, "reduction='mean'"),
        (lambda _, o, y: F.cross_entropy(o, y), HOLES, "reduction='sum', normalised=True"),
        (lambda _, o, y: F.cross_entropy(o, y, ignore_index=9), HOLES.where(HOLES >= 0, 9), "ignore_index=9, "),
        (
            lambda _, o, y: F.cross_entropy(o, y, reduction="none").sum((1, 2)).mean(),
            MASKS,
            "reduction='mean', scale=16",
        ),
        (lambda _, o, y: F.cross_entropy(o, y, torch.tensor([1.0, 2.0, 3.0])), MASKS, None),
        (lambda _, o, y: F.cross_entropy(o, y, label_smoothing=0.1), MASKS, None),
        (lambda _, o, y: F.cross_entropy(o, y, reduction="none").flatten(1).amax(1).mean(), MASKS, None),
    ],
)
def test_a_class_for_each_pixel(loss: Callable[..., Tensor], masks: Tensor, expected: str | None) -> None:
    task = of_module(Pictures(loss), PICTURES, masks).task
    assert (task is None) == (expected is None)
    assert expected is None or f"DenseClassification({expected}" in repr(task)


def test_bits_and_numbers_of_pixels() -> None:
    bits = (MASKS == 1).float()[:, None]
    model = Pictures(lambda _, o, y: F.binary_cross_entropy_with_logits(o, y), 1)
    assert repr(of_module(model, PICTURES, bits).task) == "BinaryClassification(scale=0.0625)"
    model.loss = lambda _, o, y: F.mse_loss(o, y)
    assert repr(of_module(model, PICTURES, PICTURES * 2).task) == "Regression(noise_std=2.82843)"
    model.loss = lambda _, o, y: F.l1_loss(o, y)
    assert of_module(model, PICTURES, PICTURES * 2).task is None


class Texts(torch.utils.data.Dataset):
    """Token ids of unequal lengths."""

    def __init__(self, masked: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(3, 12, (NUM,), generator=generator).tolist()
        self.ids = [torch.randint(1, 11, (length,), generator=generator) for length in lengths]
        self.masked = masked

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, i: int) -> Tensor:
        return self.ids[i]

    def collate(self, ids: list[Tensor]) -> dict[str, Tensor]:
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = (padded > 0).long()
        labels = padded.masked_fill(mask == 0, -100)
        if self.masked:  # every third token is hidden
            hidden = (torch.arange(padded.shape[1]) % 3 == 0) & (mask > 0)
            padded, labels = padded.masked_fill(hidden, 0), padded.masked_fill(~hidden, -100)
        return {"input_ids": padded, "attention_mask": mask, "labels": labels}


class TextModel(Module):
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__(loss)
        self.net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.net(input_ids)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch["input_ids"]), batch["labels"])


def next_tokens(o: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(o[:, :-1].transpose(1, 2), y[:, 1:], **options)


def mean_of_means(o: Tensor, y: Tensor) -> Tensor:
    return (next_tokens(o, y, reduction="none").sum(1) / (y[:, 1:] >= 0).sum(1)).mean()


@pytest.mark.parametrize(
    ("loss", "masked", "expected"),
    [
        (next_tokens, False, "CausalLanguageModeling(reduction='sum', normalised=True)"),
        (mean_of_means, False, "CausalLanguageModeling(reduction='mean')"),
        (lambda o, y: F.cross_entropy(o.transpose(1, 2), y), True, "TokenClassification(reduction='sum', normalised"),
        # The mean over all places of a padded batch has a divisor that depends on the longest text.
        (lambda o, y: next_tokens(o, y, reduction="none").mean(), False, None),
        (lambda o, y: F.cross_entropy(o[:, :-1].transpose(1, 2), y[:, 1:].clamp(min=0)), False, None),
    ],
)
def test_texts_of_unequal_lengths(loss: Callable[..., Tensor], masked: bool, expected: str | None) -> None:
    texts = Texts(masked)
    model = TextModel(loss)
    agreement = agree(model, Examples(texts, texts.collate), CPU, OwnLoss().of(model), batch_size=64)
    assert (agreement.task is None) == (expected is None)
    assert expected is None or expected in repr(agreement.task)


def test_pairs_of_tokens_and_their_labels() -> None:
    ids = torch.randint(0, 11, (NUM, 7), generator=torch.Generator().manual_seed(2))
    labels = (ids % 4).masked_fill(ids == 3, -100)
    model = Module(lambda _, o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()))
    model.net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4))
    expected = "DenseClassification(classes_last=True, reduction='sum', normalised=True)"
    assert repr(of_module(model, ids, labels).task) == expected
    model.net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
    task = of_module(model, ids[:, :-1], ids[:, 1:]).task
    assert repr(task) == "CausalLanguageModeling(reduction='mean')"


class Annealed(TrainingStep):
    """A penalty on outputs that grows with the epoch."""

    def _loss(self, batch: Any) -> Tensor:
        outputs, epoch = self.model(batch[0]), 0 if self.moment is None else self.moment.current_epoch
        return F.cross_entropy(outputs, batch[1]) + 0.1 * epoch * outputs.square().mean()


@pytest.mark.parametrize("moment", [None, Moment(0, 0), Moment(3, 30)])
def test_a_term_that_grows_with_the_epoch_is_seen_where_it_is_zero(moment: Moment | None) -> None:
    model = Module(lambda: None)
    agreement = agree(model, examples_of(X, CLASSES), CPU, Annealed(model, moment), batch_size=64)
    assert agreement.task is None
    assert "later in training" in agreement.reason


def test_a_step_that_draws_anew_each_time_is_no_likelihood() -> None:
    def noisy(_: Module, o: Tensor, y: Tensor) -> Tensor:
        flipped = torch.rand(len(y), generator=generator) < 0.1
        return F.cross_entropy(o, torch.where(flipped, (y + 1) % 3, y))

    generator = torch.Generator().manual_seed(0)
    assert agreed(noisy, X, CLASSES).task is None


def test_batches_that_training_skips_have_ignored_targets_alone() -> None:
    def loss(_: Module, o: Tensor, y: Tensor) -> Any:
        return None if (y < 0).all() else F.cross_entropy(o, y, ignore_index=-1)

    targets = CLASSES.where(random_tensor(NUM, seed=4) > 0.5, -1)
    assert repr(agreed(loss, X, targets).task) == "Classification(ignore_index=-1)"
    positive = lambda _, o, y, ok: None if not ok.any() else (cross_entropies(o, y) * ok).mean()  # noqa: E731
    assert agreed(positive, X, CLASSES, (X[:, 0] > 0)).task is None


def test_data_that_are_cut_short_or_sorted_show_all_their_kinds() -> None:
    order = CLASSES.argsort()
    agreement = agreed(lambda _, o, y: F.cross_entropy(o, y, WEIGHTS), X[order], CLASSES[order])
    assert repr(agreement.task) == "Classification(class_weights=[0.04, 0.2, 1])"


def test_a_large_parameter_is_compared_by_sums_of_its_rows() -> None:
    model = Module(lambda _, o, y: F.cross_entropy(o, y))
    model.net = nn.Sequential(nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 40), nn.ReLU(), nn.Linear(40, 3))
    assert model.net[2].weight.numel() > SKETCH
    assert repr(of_module(model, X, CLASSES).task) == "Classification()"
    model.loss = lambda module, o, y: F.cross_entropy(o, y) + 1e-3 * module.net[:3](X[: len(y)]).square().mean()
    assert of_module(model, X, CLASSES).task is None


def test_a_single_example_may_be_too_few_for_the_step():
    """As for a metric that squeezes its inputs."""

    def loss(module, outputs, targets):
        assert outputs.squeeze().ndim == 2
        return F.cross_entropy(outputs, targets)

    assert isinstance(agreed(loss, X, CLASSES).task, Classification)
