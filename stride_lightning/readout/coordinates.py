"""Principal coordinates of features: no more of them than examples or features, strongest first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Numbers of a block that is copied in float64.
BLOCK_NUMBERS = 2**23


@dataclass(frozen=True)
class Coordinates:
    """Coordinates ``z = phi V`` of examples with features ``phi``, the last of which is the constant 1.

    ``V`` has orthonormal columns that span the training examples' features, so a ridge on coefficients of ``z`` is one
    on those of ``phi``. What the training set does not span has no influence.

    Args:
        rotation: ``V``, shape ``(r, m)``; ``(r - 1, m - 1)`` where the constant stands apart.
        energies: Sum of squares of each coordinate over the training set, shape ``(m,)``.
        centre: Mean of the features, shape ``(r - 1,)``, where the constant stands apart as the last coordinate; else
            None.
    """

    rotation: Tensor
    energies: Tensor
    centre: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of features ``r``."""
        return len(self.rotation) + (self.centre is not None)

    def __call__(self, features: Tensor) -> Tensor:
        """Coordinates of examples with features ``(B, r)``, shape ``(B, m)``."""
        if self.centre is None:
            return features @ self.rotation
        return torch.cat([(features[:, :-1] - self.centre) @ self.rotation, torch.ones_like(features[:, :1])], 1)

    def outward(self, coefficients: Tensor) -> Tensor:
        """Coefficients on features ``(r, C, ...)``, of those on coordinates ``(m, C, ...)``.

        Where the constant stands apart, those of the other features are of their deviations from the centre.
        """
        return self._turned(self.rotation, coefficients)

    def inward(self, coefficients: Tensor) -> Tensor:
        """Undo :meth:`outward`."""
        return self._turned(self.rotation.T, coefficients)

    def _turned(self, rotation: Tensor, coefficients: Tensor) -> Tensor:
        count = rotation.shape[1]
        turned = (rotation @ coefficients[:count].flatten(1)).unflatten(1, coefficients.shape[1:])
        return torch.cat([turned, coefficients[count:]])

    def outside(self, features: Tensor) -> Tensor:
        """Squared norm of the part of each example's features that the training set does not span, shape ``(B,)``."""
        moved = features if self.centre is None else features[:, :-1] - self.centre
        return (moved.square().sum(1) - (moved @ self.rotation).square().sum(1)).clamp(min=0)


def principal_coordinates(features: Tensor, *, is_centred: bool) -> tuple[Coordinates, Tensor]:
    """Coordinates of training examples with features ``(n, r)``, and the map to them.

    With ``is_centred``, the constant stands apart and the mean is taken off the other features. The features' memory is
    used for the result: with more examples than features for the coordinates, else for the map.
    """
    if not is_centred:
        energies, rotation, coordinates = _turn(features)
        return Coordinates(rotation, energies), coordinates
    varying = features[:, :-1]
    centre = torch.stack([part.double().sum(0) for part in varying.split(8192)]).sum(0) / len(features)
    centre = centre.to(features)
    varying -= centre
    energies, rotation, coordinates = _turn(varying)
    energies = torch.cat([energies, energies.new_tensor([len(features)])])
    if varying.shape[1] > len(features):
        coordinates = torch.cat([coordinates, coordinates.new_ones(len(features), 1)], 1)
    else:  # There is room beside them, and they may be too many to copy.
        coordinates = features[:, : len(energies)]
        coordinates[:, -1] = 1
    return Coordinates(rotation, energies, centre), coordinates


def _turn(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, directions and coordinates; the coordinates, or the directions, are where the features were."""
    if features.shape[1] > len(features):
        return _from_products(features)
    energies, rotation = _from_moments(features)
    for block in features.split(8192):
        block[:, : len(energies)] = block @ rotation
    return energies, rotation, features[:, : len(energies)]


def _from_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and directions from the ``r x r`` moments."""
    width = features.shape[1]
    moments = _exact_zeros(features, width)
    for block in features.split(max(1, BLOCK_NUMBERS // width)):
        moments += _inner_products(block.to(moments).T)
    energies, directions = _spanned(moments, features)
    return energies.to(features), directions.to(features)


def _from_products(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, directions and coordinates from the ``n x n`` inner products; directions replace the features."""
    count = len(features)
    products = _exact_zeros(features, count)
    blocks = features.split(max(1, BLOCK_NUMBERS // count), 1)
    for block in blocks:
        products += _inner_products(block.to(products))
    energies, directions = _spanned(products, features)
    roots = energies.sqrt()
    inward = (directions / roots).T.to(features)
    for block in blocks:
        block[: len(roots)] = inward @ block
    return energies.to(features), features[: len(roots)].T, (directions * roots).to(features)


def _inner_products(rows: Tensor) -> Tensor:
    # A function, so that the copy of the last block is gone before the eigenvectors take their memory.
    return rows @ rows.T


def _exact_zeros(features: Tensor, size: int) -> Tensor:
    # In float64, or rounding would make directions of its own; on the CPU where the device has no float64.
    device = torch.device("cpu") if features.device.type == "mps" else features.device
    return torch.zeros(size, size, dtype=torch.float64, device=device)


def _spanned(matrix: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above rounding, largest first, and their eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    smallest = 10 * torch.finfo(features.dtype).eps * values[-1].clamp(min=0)
    spanned = (values > smallest).nonzero().flatten().flip(0)
    return values[spanned], vectors[:, spanned]
