"""Random numbers that belong to rows: the same in every batch, of the right distribution, and nothing else changes."""

import math
import random

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import distributions as D

from stride_lightning.runtime.hashed_numbers import scrambled, uniforms
from stride_lightning.runtime.randomness import preserved_random_state
from stride_lightning.runtime.row_draws import DrawnShapes, row_draws

KEYS = torch.tensor([12, 3, 1_000_000_007, 0, 2**40, 5, 77])
SIZE = len(KEYS)
torch.manual_seed(0)
VALUES = torch.rand(SIZE, 6)


def filled(name, *arguments, dtype=torch.float32):
    return lambda x: getattr(torch.empty(x.shape, dtype=dtype), name)(*arguments)


#: Functions of a batch ``(B, 6)`` of numbers from (0, 1).
DRAWS = {
    "rand": lambda x: torch.rand(len(x), 3),
    "rand double": lambda x: torch.rand(len(x), 3, dtype=torch.float64),
    "randn": lambda x: torch.randn(len(x), 5),
    "randn complex": lambda x: torch.randn(len(x), 5, dtype=torch.complex64),
    "randn half": lambda x: torch.randn(len(x), 5, dtype=torch.bfloat16),
    "randint": lambda x: torch.randint(0, 1000, (len(x),)),
    "normal": lambda x: torch.normal(1.0, 2.0, (len(x), 2)),
    "normal of means": lambda x: torch.normal(x, 0.3),
    "normal of deviations": lambda x: torch.normal(0.5, x),
    "normal of both": lambda x: torch.normal(x, x),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 3, 900),
    "normal_": filled("normal_", 1.0, 2.0),
    "uniform_": filled("uniform_", -1.0, 2.0),
    "bernoulli_": filled("bernoulli_", 0.4),
    "bernoulli_ of a tensor": lambda x: torch.empty_like(x).bernoulli_(x),
    "exponential_": filled("exponential_", 2.0),
    "random_": filled("random_", dtype=torch.int64),
    "random_ to": filled("random_", 9),
    "random_ from to": filled("random_", 4, 9),
    "geometric_": filled("geometric_", 0.2),
    "cauchy_": filled("cauchy_", 0.0, 1.0),
    "log_normal_": filled("log_normal_", 0.0, 1.0),
    "strided": lambda x: torch.empty(6, len(x)).T.normal_(),
    "bernoulli": torch.bernoulli,
    "poisson": lambda x: torch.poisson(20 * x),
    "multinomial": lambda x: torch.multinomial(x, 2),
    "multinomial with replacement": lambda x: torch.multinomial(x, 9, replacement=True),
    "one distribution for all": lambda x: torch.multinomial(torch.ones(50), len(x), replacement=True),
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout1d": lambda x: F.dropout1d(x.reshape(len(x), 3, 2), 0.4),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x.reshape(len(x), 3, 2), 0.4, training=True),
    "rrelu": lambda x: F.rrelu(-x, training=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x.log()),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.reshape(-1, 1, 3, 2)] * 3, dropout_p=0.4),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 30), x),
    "Normal": lambda x: D.Normal(x, 1 + x).rsample(),
    "Laplace": lambda x: D.Laplace(x, 1 + x).rsample(),
    "Gamma": lambda x: D.Gamma(1 + x, 1 + x).rsample(),
    "Beta": lambda x: D.Beta(1 + x, 2 - x).rsample(),
    "Dirichlet": lambda x: D.Dirichlet(1 + x).rsample(),
    "Categorical": lambda x: D.Categorical(probs=x).sample(),
    "Bernoulli": lambda x: D.Bernoulli(probs=x).sample(),
    "StudentT": lambda x: D.StudentT(2 + x).rsample(),
    "MultivariateNormal": lambda x: D.MultivariateNormal(x, torch.eye(6)).rsample(),
    "several calls": lambda x: torch.cat([torch.randn(len(x), 2), torch.rand_like(x), F.dropout(x)], 1),
}
#: Several rows for each example, or examples along the second axis.
WIDE = {
    "consecutive rows": (lambda x: torch.randn(len(x) * 3, 2), lambda y, i: y[3 * i : 3 * i + 3]),
    "consecutive rows of poisson": (
        lambda x: torch.poisson(9 * x.reshape(len(x) * 3, 2)),
        lambda y, i: y[3 * i : 3 * i + 3],
    ),
    "second axis": (lambda x: torch.randn(4, len(x), 2), lambda y, i: y[:, i : i + 1]),
    "second axis of samples": (lambda x: D.Normal(x, 1.0).rsample((4,)), lambda y, i: y[:, i : i + 1]),
    "second axis of gammas": (lambda x: D.Gamma(1 + x, 1.0).rsample((4,)), lambda y, i: y[:, i : i + 1]),
}


def rows_alone(function, index, draw=3):
    with row_draws(KEYS[index : index + 1], draw):
        return function(VALUES[index : index + 1])


@pytest.mark.parametrize("name", [*DRAWS, *WIDE])
def test_rows_of_a_batch_are_those_of_batches_of_one(name):
    function, row = WIDE.get(name) or (DRAWS[name], lambda y, i: y[i : i + 1])
    with row_draws(KEYS, 3):
        whole = function(VALUES)
    order = torch.tensor([5, 2, 0])
    with row_draws(KEYS[order], 3):
        some = function(VALUES[order])
    assert whole.dtype == rows_alone(function, 0).dtype
    for index in range(SIZE):
        assert torch.equal(row(whole, index), rows_alone(function, index)), index
    for place, index in enumerate(order.tolist()):
        assert torch.equal(row(some, place), row(whole, index))
    with row_draws(KEYS, 4):
        assert not torch.equal(function(VALUES), whole), "another draw"
    with row_draws(KEYS + 1, 3):
        assert not torch.equal(function(VALUES), whole), "other keys"


N = 20_000


def sample(function, num_keys=4):
    with row_draws(torch.arange(num_keys), 1):
        return function(num_keys).double().flatten().numpy()


@pytest.mark.parametrize(
    ("function", "distribution"),
    {
        "rand": (lambda b: torch.rand(b, N), scipy.stats.uniform()),
        "rand over keys": (lambda b: torch.rand(b, 1), scipy.stats.uniform()),
        "randn": (lambda b: torch.randn(b, N), scipy.stats.norm()),
        "randn over keys": (lambda b: torch.randn(b, 1), scipy.stats.norm()),
        "normal": (lambda b: torch.normal(torch.full((b, N), 2.0), 3.0), scipy.stats.norm(2, 3)),
        "uniform_": (lambda b: torch.empty(b, N).uniform_(-1, 3), scipy.stats.uniform(-1, 4)),
        "exponential_": (lambda b: torch.empty(b, N).exponential_(2.0), scipy.stats.expon(scale=0.5)),
        "cauchy_": (lambda b: torch.empty(b, N).cauchy_(1.0, 2.0), scipy.stats.cauchy(1, 2)),
        "log_normal_": (lambda b: torch.empty(b, N).log_normal_(0.5, 0.7), scipy.stats.lognorm(0.7, scale=math.e**0.5)),
        "gamma": (lambda b: D.Gamma(torch.full((b, N), 2.0), 3.0).sample(), scipy.stats.gamma(2, scale=1 / 3)),
    }.values(),
    ids=lambda value: None if callable(value) else "",
)
def test_continuous_distributions(function, distribution):
    num_keys = N if function(1).numel() == 1 else 4
    assert scipy.stats.kstest(sample(function, num_keys), distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("function", "distribution"),
    {
        "randint": (lambda b: torch.randint(3, 8, (b, N)), scipy.stats.randint(3, 8)),
        "bernoulli": (lambda b: torch.bernoulli(torch.full((b, N), 0.3)), scipy.stats.bernoulli(0.3)),
        "geometric_": (lambda b: torch.empty(b, N).geometric_(0.4), scipy.stats.geom(0.4)),
        "poisson": (lambda b: torch.poisson(torch.full((b, N), 2.0)), scipy.stats.poisson(2)),
        "dropout": (lambda b: F.dropout(torch.ones(b, N), 0.5) / 2, scipy.stats.bernoulli(0.5)),
        "multinomial": (
            lambda b: torch.multinomial(torch.tensor([[0.7, 0.3]]).expand(b * N, 2), 1),
            scipy.stats.bernoulli(0.3),
        ),
        "multinomial with replacement": (
            lambda b: torch.multinomial(torch.tensor([[1.4, 0.6]]).expand(b, 2), N, replacement=True),
            scipy.stats.bernoulli(0.3),
        ),
        "first of two": (
            lambda b: torch.multinomial(torch.tensor([[0.7, 0.3]]).expand(b * N, 2), 2)[:, 0],
            scipy.stats.bernoulli(0.3),
        ),
    }.values(),
    ids=lambda value: None if callable(value) else "",
)
def test_discrete_distributions(function, distribution):
    values, counts = np.unique(sample(function), return_counts=True)
    expected = distribution.pmf(values) * counts.sum()
    often = expected > 20
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert scipy.stats.chi2(max(1, often.sum() - 1)).sf(statistic) > 1e-3


def test_numbers_of_different_examples_calls_and_draws_are_uncorrelated():
    def draw(number):
        with row_draws(torch.arange(40), number):
            return torch.stack([torch.randn(40, 2000), torch.randn(40, 2000)])

    rows = torch.cat([draw(0).flatten(0, 1), draw(1).flatten(0, 1)])
    correlations = rows.corrcoef() - torch.eye(len(rows))
    assert correlations.abs().max() < 6 / 2000**0.5


def test_hashed_numbers_are_those_of_splitmix64():
    """The first numbers of the reference implementation from the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state, numbers = torch.tensor([1234567]), []
    for _ in expected:
        numbers.append(int(scrambled(state)) % 2**64)
        state = state + -7046029254386353131
    assert numbers == expected


@pytest.mark.parametrize("digits", [8, 24, 53])
def test_uniforms_stay_inside(digits):
    values = uniforms(torch.arange(100), 1000, digits)
    assert values.min() >= 0
    assert values.max() < 1
    assert torch.equal(values * 2**digits, (values * 2**digits).round())
    inner = uniforms(torch.arange(100), 1000, digits, inner=True)
    assert inner.min() > 0
    assert inner.max() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rand_never_gives_one(dtype):
    with row_draws(torch.arange(50), 0):
        assert torch.rand(50, 2000, dtype=dtype).max() < 1


def test_tensors_that_do_not_count_examples_depend_on_draw_and_call_alone():
    def draw(keys, number):
        with row_draws(keys, number):
            first = torch.rand(keys.numel(), 2)
            return torch.rand(()), torch.randn(5), torch.randperm(9), first

    three, four = draw(torch.arange(3), 0), draw(torch.tensor([9, 8, 1, 4]), 0)
    for one, other in zip(three[:3], four[:3], strict=True):
        assert torch.equal(one, other)
    assert sorted(three[2].tolist()) == list(range(9))
    other = draw(torch.arange(3), 1)
    assert not any(torch.equal(a, b) for a, b in zip(three, other, strict=True))


#: What one call draws in a batch, and whether the examples have parts of it.
AMBIGUOUS = {
    "one number for the batch": (lambda x: torch.rand(1), lambda y, i: y),
    "one number for each": (lambda x: torch.rand(len(x)), lambda y, i: y[i : i + 1]),
    "noise of weights": (lambda x: torch.randn(12, 2), lambda y, i: y),
    "samples first": (lambda x: torch.randn(4, len(x), 2), lambda y, i: y[:, i : i + 1]),
    "several rows": (lambda x: torch.randn(4 * len(x), 4), lambda y, i: y[4 * i : 4 * i + 4]),
    "as many as the longest": (
        lambda x: torch.randn(len(x) * (len(x) + 3), 1),
        lambda y, i: y[i * (math.isqrt(len(y) + 2) + 2) :][:4],
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_two_batch_sizes_tell_which_axis_counts_examples(name):
    function, part = AMBIGUOUS[name]
    shapes = DrawnShapes()

    def draw(keys):
        with row_draws(keys, 0, shapes):
            return function(keys)

    draw(KEYS[:3])
    draw(KEYS[:1])
    for size in (1, 2, 4, 6):
        whole = draw(KEYS[:size])
        for index in range(size):
            assert torch.equal(part(whole, index), draw(KEYS[index : index + 1])), (size, index)


def test_gradients_flow():
    x = VALUES.clone().requires_grad_()
    with row_draws(KEYS, 0):
        dropped = F.dropout(x, 0.5)
        noisy = x + x * torch.randn_like(x)
        gamma = D.Gamma(1 + x, 1.0).rsample()
    (slope,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(slope, dropped.detach() / VALUES)
    (slope,) = torch.autograd.grad(noisy.sum(), x)
    torch.testing.assert_close(slope, noisy.detach() / VALUES)
    assert torch.autograd.grad(gamma.sum(), x)[0].abs().min() > 0


def test_vmap_inside():
    """Under ``vmap`` the axis that is mapped counts the examples."""

    def loss(x):
        return (x * torch.randn_like(x)).sum()

    with row_draws(KEYS, 0):
        slopes = torch.func.vmap(torch.func.grad(loss), randomness="different")(VALUES)
    with row_draws(KEYS[2:3], 0):
        slope = torch.func.vmap(torch.func.grad(loss), randomness="different")(VALUES[2:3])
    assert torch.equal(slopes[2:3], slope)


def test_generators_that_are_passed_are_left_alone():
    generator, plain = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    with row_draws(KEYS, 0):
        values = [torch.rand(SIZE, generator=generator), torch.empty(SIZE).normal_(generator=generator)]
    assert torch.equal(values[0], torch.rand(SIZE, generator=plain))
    assert torch.equal(values[1], torch.empty(SIZE).normal_(generator=plain))


def test_without_keys_a_batch_has_numbers_of_its_own():
    with row_draws(None, 2):
        one = torch.rand(3).tolist(), random.random()
    with row_draws(None, 2):
        assert (torch.rand(3).tolist(), random.random()) == one


def test_generators_are_as_before():
    def numbers():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    with preserved_random_state():
        expected = numbers()
    with row_draws(KEYS, 0):
        inside = numbers()
    with row_draws(KEYS[:2], 0):
        assert numbers()[1:] == inside[1:], "Python and NumPy are seeded by the draw"
    assert numbers() == expected
    with pytest.raises(RuntimeError, match="inside"), row_draws(KEYS, 0):
        raise RuntimeError("inside")
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
