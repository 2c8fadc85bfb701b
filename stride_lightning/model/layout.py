"""Layout of a block: where its parameters lie in vectors or matrices, and which modules their gradients come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stride_lightning.model.blocks import Block
from stride_lightning.model.layer_rules import LayerRule


@dataclass
class Source:
    """One watched module that contributes to the gradient of a block."""

    module: str
    rule: LayerRule | None  # how its matrix is read; None if its parameters are read by running it again
    vectorized: bool = True  # whether running it again takes all examples at once
    #: For each of its calls: which leaves of its arguments have one part per example.
    is_cut: list[list[bool]] = field(default_factory=list)


@dataclass
class Layout:
    """The parameters of a block, and how they lie in its vectors or matrices."""

    parameters: tuple[str, ...]  # a matrix and perhaps a bias joined to it, or a single parameter
    shapes: tuple[torch.Size, ...]
    bias_axis: int  # along which the bias is joined
    sources: list[Source]  # a tied matrix has several

    @property
    def way(self) -> str:
        """How gradients are read, in a word or two."""
        if self.sources[0].rule is not None:
            return "factors"
        return "vectorized" if self.sources[0].vectorized else "one by one"

    @property
    def constant_side(self) -> str | None:
        """Which factor is the same for all functions of the outputs; None if neither is."""
        sides = {None if source.rule is None else source.rule.entered_side for source in self.sources}
        return sides.pop() if len(sides) == 1 else None

    @property
    def num_parameters(self) -> int:
        """Number of values."""
        return sum(shape.numel() for shape in self.shapes)

    def times(self, block: Block, factors: Mapping[str, float]) -> Block:
        """Gradients with those in each parameter multiplied by a number, as by its learning rate."""
        first, last = factors[self.parameters[0]], factors[self.parameters[-1]]
        if first == last:
            return block.scaled(torch.tensor(first).to(block.like).expand(len(block)))
        named = zip(self.parameters, self.shapes, strict=True)
        joined = self.join({name: torch.full((1, *shape), factors[name]) for name, shape in named})
        return Block(block.dense() * joined.to(block.like))

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors of the block as tensors of shape ``(B, *shape)`` by parameter."""
        if len(self.parameters) == 1:
            return {self.parameters[0]: vectors.reshape(len(vectors), *self.shapes[0])}
        rows = self.shapes[0][0] + (self.bias_axis == 0)
        matrices = vectors.reshape(len(vectors), rows, -1)
        end = matrices.shape[1 + self.bias_axis] - 1
        weight = matrices.narrow(1 + self.bias_axis, 0, end).reshape(len(vectors), *self.shapes[0])
        return dict(zip(self.parameters, (weight, matrices.select(1 + self.bias_axis, end)), strict=True))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        first = parts[self.parameters[0]]
        if len(self.parameters) == 1:
            return first.reshape(len(first), -1)
        matrices = first.flatten(2) if self.bias_axis else first
        bias = parts[self.parameters[1]].unsqueeze(1 + self.bias_axis)
        return torch.cat([matrices, bias], 1 + self.bias_axis).flatten(1)
