"""Pictures inside a page: PNGs as data URIs, each picture once."""

from __future__ import annotations

import base64
import io

from torch import Tensor

#: Longest side of an embedded picture, in pixels; larger ones are averaged down.
LONGEST = 128


class Pictures:
    """Collects pictures as data URIs; equal pictures share one.

    Example:
        >>> import torch
        >>> pictures = Pictures()
        >>> [pictures.add(image) for image in (torch.zeros(8, 8), torch.ones(8, 8), torch.zeros(8, 8))]
        [0, 1, 0]
        >>> pictures.uris()[0][:25]
        'data:image/png;base64,iVB'
    """

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def add(self, image: Tensor) -> int:
        """Add a picture of shape ``(H, W)`` or ``(H, W, 3)`` in 0..1, and return its place in :meth:`uris`.

        Raises:
            ModuleNotFoundError: If Pillow is not installed.
        """
        uri = "data:image/png;base64," + base64.b64encode(png(image)).decode()
        return self._places.setdefault(uri, len(self._places))

    def uris(self) -> list[str]:
        """All pictures so far."""
        return list(self._places)


def png(image: Tensor) -> bytes:
    r"""A PNG file of a picture ``(H, W)`` or ``(H, W, 3)`` in 0..1, 8 bits a channel, at most ``LONGEST`` pixels long.

    Example:
        >>> import torch
        >>> png(torch.rand(4, 5))[:8]
        b'\x89PNG\r\n\x1a\n'
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "report() needs Pillow to embed the pictures of these examples: pip install 'stride-lightning[plot]'."
        ) from error
    picture = Image.fromarray((image * 255).round().byte().numpy())
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)  # a pixel is the mean of what it replaces
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()
