"""Random numbers that belong to the examples of a batch, not to the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from stride_lightning.runtime.hashed_numbers import random_bits, scrambled, uniforms
from stride_lightning.runtime.operations import Operations
from stride_lightning.runtime.randomness import mix, seeded


class DrawnShapes:
    """Shapes that each call drew in batches of different sizes; they tell which axis counts the examples.

    One batch cannot tell: in a batch of one, ``torch.rand(1)`` may be a number for the example or for the batch.
    """

    def __init__(self) -> None:
        self._shapes: dict[int, dict[int, tuple[int, ...]]] = {}
        #: Whether a random function got a generator of the caller's, whose numbers belong to the batch.
        self.has_generators = False

    def axis(self, call: int, num_examples: int, shape: Sequence[int]) -> int | None:
        """The axis of a tensor that counts examples, or consecutive rows of each; None for tensors of the batch."""
        shapes = self._shapes.setdefault(call, {})
        if len(shapes) < 2:
            shapes.setdefault(num_examples, tuple(shape))
        others = [(size, other) for size, other in shapes.items() if size != num_examples and len(other) == len(shape)]
        for size, other in others[:1]:
            for axis, (extent, other_extent) in enumerate(zip(shape, other, strict=True)):
                if extent * size == other_extent * num_examples and extent % num_examples == 0:
                    return axis
            if tuple(shape) == other:
                return None
        if shape and shape[0] % num_examples == 0:
            return 0
        return 1 if len(shape) > 1 and shape[1] == num_examples else None


@contextmanager
def row_draws(keys: Tensor | None, draw: int, shapes: DrawnShapes | None = None) -> Iterator[None]:
    """Inside the block, torch's random functions draw for every example of a batch on its own.

    The numbers of example i are functions of ``keys[i]``, the number of the draw and the number of the call, so neither
    the rest of the batch nor its order changes them. The first axis of the tensor that is drawn counts the examples, or
    consecutive rows of each. If it does not and the second axis does, that one counts. Any other tensor, and
    ``randperm``, depend on the draw and the call alone. Generators that are passed to torch's functions are left alone.

    The generators of Python, NumPy and torch are seeded with the number of the draw. Afterwards they are as before.

    Args:
        keys: int64, shape ``(B,)``; None for random numbers that belong to the batch.
        draw: Number of the draw.
        shapes: What earlier blocks with the same calls drew; after two batches of different sizes it is certain which
            tensors have rows of examples.

    Example:
        >>> with row_draws(torch.tensor([7, 8, 9]), draw=0):
        ...     three = torch.randn(3, 2)
        >>> with row_draws(torch.tensor([8]), draw=0):
        ...     print(torch.equal(torch.randn(1, 2), three[1:2]))
        True
    """
    with seeded(mix(draw)), nullcontext() if keys is None else Operations(RowDraws(keys, draw, shapes)):
        yield


class RowDraws:
    """Answers the calls of random functions, as a watcher of :class:`Operations`; see :func:`row_draws`."""

    def __init__(self, keys: Tensor, draw: int, shapes: DrawnShapes | None = None) -> None:
        self._keys, self._draw = scrambled(keys.reshape(-1)), draw
        self._shapes = DrawnShapes() if shapes is None else shapes
        self._num_calls = 0

    def turn_to(self, keys: Tensor) -> None:
        """From now on draw for other examples, from their first call on."""
        self._keys, self._num_calls, self._shapes = scrambled(keys.reshape(-1)), 0, DrawnShapes()

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The numbers of a random function; NotImplemented for any other."""
        if not _is_random(func):
            return NotImplemented
        given = dict(zip(_names(func), args, strict=False)) | kwargs
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device(given.get("device") or "cpu")
        if given.get("generator") is not None:
            self._shapes.has_generators = True
            return NotImplemented
        if device.type == "meta":
            return NotImplemented
        self._num_calls += 1
        axis = partial(self._shapes.axis, self._num_calls, len(self._keys))
        numbers = _Numbers(self._keys, mix(self._draw, self._num_calls), axis, device)
        name = func._schema.name.removeprefix("aten::")
        if name in _SAMPLERS:
            return _SAMPLERS[name](numbers, given)
        if name not in _VALUES:
            return _row_by_row(numbers, func, given)
        target = given["self"] if name.endswith("_") else _blank(given)
        return target.copy_(_VALUES[name](numbers, target, given))


@cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@cache
def _names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


class _Numbers:
    """Random numbers for one call, from seeds of the examples or of the call."""

    def __init__(
        self, keys: Tensor, call: int, axis: Callable[[Sequence[int]], int | None], device: torch.device
    ) -> None:
        self._keys, self._call = keys, call
        #: The axis of a tensor of a shape that counts examples, or None.
        self.axis = axis
        #: Where the numbers are made: not every device knows float64.
        self._device = torch.device("cpu") if device.type == "mps" else device

    def seeds(self, axis: int | None) -> Tensor:
        """One seed for each example, or a single one where no axis counts them."""
        if axis is None:
            return scrambled(~torch.tensor([self._call], device=self._device))
        return scrambled(self._keys.to(self._device) + self._call)

    def _drawn(self, shape: Sequence[int], draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        axis, size = self.axis(shape), math.prod(shape)
        seeds = self.seeds(axis)
        values = draw(seeds, size // len(seeds))
        if not axis:
            return values.reshape(shape)
        rows = shape[axis] // len(seeds)
        return values.reshape(-1, *shape[:axis], rows, *shape[axis + 1 :]).movedim(0, axis).reshape(shape)

    def uniforms(self, shape: Sequence[int], digits: int = 53, *, inner: bool = False) -> Tensor:
        """Numbers from [0, 1), or from (0, 1)."""
        return self._drawn(shape, partial(uniforms, digits=digits, inner=inner))

    def normals(self, like: Tensor) -> Tensor:
        """Numbers of the normal distribution of variance 1, complex where ``like`` is."""
        if not like.is_complex():
            return torch.special.ndtri(self.uniforms(like.shape, inner=True))
        parts = torch.special.ndtri(self.uniforms((*like.shape, 2), inner=True))
        return torch.view_as_complex(parts) * 0.5**0.5

    def exponentials(self, shape: Sequence[int]) -> Tensor:
        """Numbers of the exponential distribution of mean 1."""
        return -torch.log(self.uniforms(shape, inner=True))

    def integers(self, shape: Sequence[int], count: int) -> Tensor:
        """Integers from 0 to ``count - 1``."""
        return (self._drawn(shape, random_bits) & torch.iinfo(torch.int64).max) % count


def _digits(like: Tensor) -> int:
    """Binary digits of a number below 1 in a tensor's precision."""
    return 1 - round(math.log2(torch.finfo(like.dtype).eps)) if like.is_floating_point() else 53


def _blank(given: dict[str, Any]) -> Tensor:
    """The tensor that a call makes, not filled."""
    options: dict[str, Any] = {name: given[name] for name in ("dtype", "device") if given.get(name) is not None}
    if given.get("out") is not None:
        shape = given["size"] if "size" in given else given["self"].shape
        return given["out"].resize_(shape)
    if "size" in given:
        if "high" in given:
            options.setdefault("dtype", torch.int64)
        return torch.empty(given["size"], **options)
    if "mean" in given:
        tensors = [value for value in (given["mean"], given["std"]) if isinstance(value, Tensor)]
        return tensors[0].new_empty(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    return torch.empty_like(given["self"], memory_format=given.get("memory_format"), **options)


# ---- distributions that are functions of uniform numbers: what a tensor is filled with ----------------------------


def _uniform(numbers: _Numbers, target: Tensor, given: dict[str, Any]) -> Tensor:
    low, high = given.get("from", 0.0), given.get("to", 1.0)
    if target.is_complex():
        return torch.view_as_complex(numbers.uniforms((*target.shape, 2)))
    return low + numbers.uniforms(target.shape, _digits(target)) * (high - low)


def _normal(numbers: _Numbers, target: Tensor, given: dict[str, Any]) -> Tensor:
    mean, std = (_doubled(given.get(name, default)) for name, default in (("mean", 0.0), ("std", 1.0)))
    return mean + std * numbers.normals(target)


def _log_normal(numbers: _Numbers, target: Tensor, given: dict[str, Any]) -> Tensor:
    return torch.exp(_normal(numbers, target, {"mean": 1.0, "std": 2.0} | given))


def _exponential(numbers: _Numbers, target: Tensor, given: dict[str, Any]) -> Tensor:
    return numbers.exponentials(target.shape) / given.get("lambd", 1.0)


def _cauchy(numbers: _Numbers, target: Tensor, given: dict[str, Any]) -> Tensor:
    angles = (numbers.uniforms(target.shape, inner=True) - 0.5) * math.pi
    return given.get("median", 0.0) + given.get("sigma", 1.0) * torch.tan(angles)


def _geometric(numbers: _Numbers, target: Tensor, given: dict[str, Any]) -> Tensor:
    if given["p"] == 1:
        return torch.ones(())
    return torch.ceil(numbers.exponentials(target.shape) / -math.log1p(-given["p"]))


def _integer(numbers: _Numbers, target: Tensor, given: dict[str, Any]) -> Tensor:
    low, high = given.get("low", given.get("from", 0)), given.get("high", given.get("to"))
    if high is None:  # random_() without bounds: all numbers from `low` on that the precision holds
        high = 2 ** _digits(target) if target.is_floating_point() else 2 if target.dtype == torch.bool else None
    if high is None:
        return numbers.integers(target.shape, torch.iinfo(target.dtype).max - low) + low
    if isinstance(high, Tensor):
        high = high.to(torch.int64)
    return numbers.integers(target.shape, high - low) + low


def _bernoulli(numbers: _Numbers, target: Tensor, given: dict[str, Any]) -> Tensor:
    # Without a chance, bernoulli_() takes one half, and bernoulli() the tensor's own values.
    chances = given.get("p", 0.5 if target is given["self"] else given["self"])
    return numbers.uniforms(target.shape) < _doubled(chances)


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and not value.is_complex() else value


_VALUES: dict[str, Callable[[_Numbers, Tensor, dict[str, Any]], Tensor]] = {
    **dict.fromkeys(("rand", "rand_like", "uniform_"), _uniform),
    **dict.fromkeys(("randn", "randn_like", "normal", "normal_"), _normal),
    **dict.fromkeys(("randint", "randint_like", "random_"), _integer),
    **dict.fromkeys(("bernoulli", "bernoulli_"), _bernoulli),
    "exponential_": _exponential,
    "log_normal_": _log_normal,
    "cauchy_": _cauchy,
    "geometric_": _geometric,
}


# ---- the others ---------------------------------------------------------------------------------------------------


def _dropout(numbers: _Numbers, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    values, share = given["input"], given["p"]
    if not given["train"]:
        return values.clone(), torch.ones_like(values, dtype=torch.bool)
    mask = (numbers.uniforms(values.shape) >= share).to(values.device)
    return values * mask * (1 / (1 - share) if share < 1 else 0.0), mask


def _multinomial(numbers: _Numbers, given: dict[str, Any]) -> Tensor:
    chances, count = given["self"].double(), given["num_samples"]
    if given.get("replacement", False):
        sums = chances.cumsum(-1)
        points = numbers.uniforms((*chances.shape[:-1], count)).to(sums.device) * sums[..., -1:]
        return torch.searchsorted(sums, points, right=True).clamp(max=chances.shape[-1] - 1)
    # The first of independent exponential waiting times, the second, and so on.
    return (chances / numbers.exponentials(chances.shape).to(chances.device)).topk(count, dim=-1).indices


_SAMPLERS: dict[str, Callable[[_Numbers, dict[str, Any]], Any]] = {
    "native_dropout": _dropout,
    "multinomial": _multinomial,
}


def _row_by_row(numbers: _Numbers, func: Any, given: dict[str, Any]) -> Any:
    """Call a function once for each example, with a generator of its own."""
    packet, tensors = func.overloadpacket, [value for value in given.values() if isinstance(value, Tensor)]
    if not any("generator" in _names(getattr(packet, overload)) for overload in packet.overloads()):
        return func(**given)
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    axis = numbers.axis(shape) if tensors else None
    generator = torch.Generator(tensors[0].device if tensors else given.get("device") or "cpu")
    seeds = numbers.seeds(axis).tolist()

    def call(arguments: dict[str, Any], seed: int) -> Any:
        return packet(**arguments | {"generator": generator.manual_seed(seed)})

    if axis is None:
        return call(given, seeds[0])
    rows = shape[axis] // len(seeds)

    def part(value: Any, first: int) -> Any:
        if not isinstance(value, Tensor) or value.ndim < len(shape) - axis:
            return value
        counted = axis - len(shape) + value.ndim
        return value.narrow(counted, first, rows) if value.shape[counted] == shape[axis] else value

    results = [
        call({name: part(value, number * rows) for name, value in given.items()}, seed)
        for number, seed in enumerate(seeds)
    ]
    return given["self"] if func._schema.name.endswith("_") else torch.cat(results, axis)
