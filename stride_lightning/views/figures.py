"""Figures of proponents and opponents: a grid of pictures if inputs are images, bars otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stride_lightning.results.scores import AttributionResult, ImageShape
from stride_lightning.views.drawing import draw_bars, draw_pictures
from stride_lightning.views.ranking import rank_examples

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_grid(
    attribution: AttributionResult, queries: Sequence[int], k: int = 5, *, image_shape: ImageShape = None
) -> Figure:
    """A figure with one row per query: its proponents and opponents as pictures, or as bars if inputs are no images.

    ``queries`` are rows of the scores; other arguments are those of :meth:`~stride_lightning.Attribution.plot`.

    Returns:
        A figure without pyplot: ``figure.savefig("queries.png")`` writes it, nothing needs closing.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If ``queries`` is empty, or ``image_shape`` does not fit the inputs.

    Example:
        >>> from stride_lightning.results.attribution import Attribution
        >>> from stride_lightning.data.examples import Examples
        >>> images = Examples([(torch.rand(1, 8, 8), 0) for _ in range(5)])
        >>> attribution = Attribution(torch.randn(2, 5).abs(), queries=images, train_data=images)
        >>> len(plot_grid(attribution, [0, 1], k=3).axes)  # (1 query + 3 proponents) x 2
        8
    """
    if len(queries) == 0:
        raise ValueError("`queries` is empty: nothing to plot.")
    # Rows are counted from the start, as captions name them.
    rows = [query % attribution.num_queries if query < 0 else query for query in queries]
    pictures = shows_images(attribution, image_shape=image_shape)
    ranked = [rank_examples(attribution, query, k, with_std=not pictures) for query in rows]
    if pictures:
        return draw_pictures(attribution, rows, ranked, partial(as_image, image_shape=image_shape))
    return draw_bars(attribution, rows, ranked)


def shows_images(attribution: AttributionResult, *, image_shape: ImageShape = None) -> bool:
    """Whether the attribution holds queries and training examples that are images, so that figures show pictures."""
    sources = (attribution.queries, attribution.train_data)
    return all(data is not None and as_image(data[0], image_shape=image_shape) is not None for data in sources)


def as_image(example: Any, *, image_shape: ImageShape = None) -> Tensor | None:
    """The picture in an example, or None.

    Pictures are floats or uint8 of shape ``(H, W)``, ``(1, H, W)``, ``(3, H, W)`` or ``(H, W, 3)``, or PIL images.
    Floats outside 0..1, as after standardisation, are stretched from the picture's minimum to its maximum.

    Args:
        example: As the dataset returns it: the input, a tuple that begins with it, or a dictionary that holds it.
        image_shape: Shape of the picture in a flattened input.

    Returns:
        Shape ``(H, W)`` or ``(H, W, 3)`` in 0..1, or None if the example is no picture.

    Raises:
        ValueError: If the input cannot take the shape ``image_shape``.

    Example:
        >>> as_image((torch.zeros(3, 32, 32), 7)).shape
        torch.Size([32, 32, 3])
        >>> as_image(torch.zeros(64)) is None, as_image(torch.zeros(64), image_shape=(8, 8)).shape
        (True, torch.Size([8, 8]))
    """
    if isinstance(example, dict):
        inputs = (value for value in example.values() if getattr(value, "ndim", 1) > 0)  # scalars are labels
        images = (as_image(value, image_shape=image_shape) for value in inputs)
        return next((image for image in images if image is not None), None)
    if isinstance(example, tuple | list):
        return as_image(example[0], image_shape=image_shape) if len(example) else None
    if hasattr(example, "convert") and hasattr(example, "getbands"):  # PIL
        example = np.asarray(example.convert("L" if len(example.getbands()) == 1 else "RGB"))
    if isinstance(example, np.ndarray) and example.dtype.kind in "fu":
        example = torch.tensor(example)
    if not isinstance(example, Tensor):
        return None
    if image_shape is not None:
        if example.numel() != torch.Size(image_shape).numel():
            shape = tuple(example.shape)
            raise ValueError(
                f"An input of shape {shape} cannot be shown with image_shape={image_shape}. Give a shape of "
                f"{example.numel()} values."
            )
        example = example.reshape(image_shape)
    if not (example.is_floating_point() or example.dtype == torch.uint8):
        return None
    if example.ndim == 3 and example.shape[0] in (1, 3):
        example = example.squeeze(0) if example.shape[0] == 1 else example.permute(1, 2, 0)
    if not (example.ndim == 2 or (example.ndim == 3 and example.shape[2] == 3)) or min(example.shape[:2]) < 2:
        return None
    pixels = example.detach().cpu().float() / (255 if example.dtype == torch.uint8 else 1)
    pixels = pixels.nan_to_num()
    low, high = pixels.aminmax()
    return pixels if low >= 0 and high <= 1 else (pixels - low) / (high - low).clamp_min(1e-12)
