"""Random projections: linear, made of the seed alone, and right on average."""

import pytest
import torch

from stride_lightning.gradients.projection import EVERYTHING, JointProjection, LayerProjection
from stride_lightning.model.blocks import CHUNK_BYTES, Block, Gradients, Outer
from stride_lightning.runtime.metering import Meter
from tests.helpers.gradient_models import tokens
from tests.helpers.tiny import random_tensor

ROWS, COLUMNS = 5, 4


def gradients(num=6, seed=0):
    """A matrix of several places, one of lookups, a tied one and a vector."""
    left, right = random_tensor(num, 2, ROWS, seed=seed), random_tensor(num, 2, COLUMNS, seed=seed + 1)
    looked = Outer(tokens(num, 3, size=ROWS, seed=seed), random_tensor(num, 3, COLUMNS, seed=seed + 2), ROWS)
    return Gradients(
        {
            "matrix": Block(None, (Outer(left, right, ROWS),)),
            "table": Block(None, (looked,)),
            "tied": Block(None, (looked, Outer(left, right, ROWS))),
            "vector": Block(random_tensor(num, 9, seed=seed + 3)),
        }
    )


SIZE = 3 * ROWS * COLUMNS + 9
MAPS = {
    "joint": lambda seed=0, dim=7: JointProjection(dim, seed, SIZE),
    "by layer": lambda seed=0, dim=2: LayerProjection(dim, seed),
}
every_map = pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@every_map
def test_seed_and_nothing_else(make):
    given = gradients()
    first = make()(given).dense()
    assert torch.equal(make()(given).dense(), first)
    torch.manual_seed(5)
    assert torch.equal(make()(given).dense(), first)
    other = make(seed=1)(given).dense()
    assert (other - first).abs().max() > 0.1 * first.abs().max()
    state = torch.get_rng_state()
    make()(given)
    assert torch.equal(torch.get_rng_state(), state)


@every_map
def test_examples_are_projected_by_themselves(make):
    given = gradients()
    whole = make()(given).dense()
    project = make()  # one map for all parts, as signs are kept
    parts = torch.cat([project(given.rows(slice(i, i + 2))).dense() for i in range(0, 6, 2)])
    close(parts, whole)


@every_map
def test_factors_and_vectors_have_one_projection(make):
    """A matrix with one more place that holds nothing, and lookups written as numbers: the same features."""
    given = gradients()
    table = given["table"].outers[0]
    (outer,) = given["matrix"].outers
    written = Gradients(
        {
            "matrix": Block(None, tuple(Outer(outer.left[:, [t]], outer.right[:, [t]], ROWS) for t in (0, 1))),
            "table": Block(None, (Outer(table.left_dense(), table.right, ROWS),)),
            "tied": Block(None, given["tied"].outers[::-1]),
            "vector": given["vector"],
        }
    )  # fmt: skip
    close(make()(written).dense(), make()(given).dense())


@every_map
def test_linear(make):
    project, factors = make(), random_tensor(6, seed=8)
    close(project(gradients().scaled(factors)).dense(), project(gradients()).dense() * factors[:, None])
    zero = gradients().scaled(torch.zeros(6, dtype=torch.float64))
    assert project(zero).dense().abs().max() == 0


@every_map
def test_inner_products_are_right_on_average(make):
    """Mean over seeds within four standard errors of every pair's inner product, and the errors shrink with seeds."""
    mine, theirs = gradients(), gradients(4, seed=30)
    exact = mine.inner(theirs)
    drawn = torch.stack([make(seed=seed)(mine).inner(make(seed=seed)(theirs)) for seed in range(600)])
    error = drawn.std(0) / 600**0.5
    assert ((drawn.mean(0) - exact).abs() < 4.5 * error).all()
    assert (error < 0.25 * mine.squared_norms().mean()).all()
    assert ((drawn - exact).abs() > 1e-6).any()


@pytest.mark.parametrize("name", ["matrix", "table", "tied", "vector"])
@every_map
def test_every_block_on_average(make, name):
    """By itself: errors in one block would be hidden in the sum of all."""
    one = Gradients({name: gradients()[name]})
    exact = one.inner(one)
    drawn = torch.stack([make(seed=seed)(one).inner(make(seed=seed)(one)) for seed in range(300)])
    assert ((drawn.mean(0) - exact).abs() < 5 * drawn.std(0) / 300**0.5 + 1e-9).all()


def test_more_features_are_closer():
    given = gradients()
    exact = given.inner(given)
    errors = [(MAPS["joint"](dim=dim)(given).inner(MAPS["joint"](dim=dim)(given)) - exact).norm() for dim in (4, 60)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("dim", [SIZE, SIZE + 1, 10**6])
def test_enough_features_keep_everything(dim):
    given = gradients()
    projected = MAPS["joint"](dim=dim)(given)
    assert torch.equal(projected.dense(), given.dense())
    assert list(projected) == [EVERYTHING]
    assert MAPS["joint"](dim=SIZE - 1)(given).dense().shape == (6, SIZE - 1)


@pytest.mark.parametrize(
    ("dim", "sizes"), [(2, [4, 4, 4, 4]), (4, [16, 16, 16, 9]), (5, [20, 20, 20, 9]), (1, [1, 1, 1, 1])]
)
def test_narrow_sides_are_kept(dim, sizes):
    projected = MAPS["by layer"](dim=dim)(gradients())
    assert [block.size for block in projected.values()] == sizes
    assert all(block.is_dense for block in projected.values())
    if dim == 5:
        close(projected.dense(), gradients().dense())


def test_layer_projection_is_two_sided():
    """``P_S G P_A'``: of rank one matrices, the outer product of two projected sides."""
    left, right = random_tensor(3, 1, ROWS, seed=0), random_tensor(3, 1, COLUMNS, seed=1)
    projected = (
        MAPS["by layer"]()(Gradients({"w": Block(None, (Outer(left, right, ROWS),))}))["w"].dense().view(3, 2, 2)
    )
    assert (torch.linalg.matrix_rank(projected) == 1).all()
    same_left = Outer(left[:1].expand(3, 1, ROWS), right, ROWS)
    stacked = MAPS["by layer"]()(Gradients({"w": Block(None, (same_left,))}))["w"].dense().view(3, 2, 2)
    # One left factor: all matrices have one column space.
    assert torch.linalg.matrix_rank(stacked.transpose(1, 2).reshape(6, 2)) == 1


def test_layers_have_maps_of_their_own():
    block = gradients()["matrix"]
    projected = MAPS["by layer"]()(Gradients({"a": block, "b": block}))
    assert (projected["a"].dense() - projected["b"].dense()).abs().max() > 1e-3


def test_products_of_many_places_are_made_in_chunks():
    """All at once they would take 1.6 GB; a budget of bytes changes nothing but rounding."""
    left, right = random_tensor(40, 784, 3, seed=0), random_tensor(40, 784, 5, seed=1)
    gradients = Gradients({"conv": Block(None, (Outer(left, right, 3),))})
    project = JointProjection(4096, seed=0, num_parameters=10**6)
    alone = torch.cat([project(gradients.rows(slice(i, i + 1)))[EVERYTHING].dense() for i in range(40)])
    with Meter() as meter:
        together = project(gradients)[EVERYTHING].dense()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)
    assert meter.peak_memory is None or meter.peak_memory < 4 * CHUNK_BYTES
