"""Pictures inside a page: PNG without an imaging library, each picture once."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from torch import Tensor
from torch.nn import functional as F

#: Longest side of an embedded picture, in pixels; larger ones are averaged down.
LONGEST = 128


class Pictures:
    """Collects pictures as data URIs; equal ones are kept once.

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
        """Take a picture, shape ``(H, W)`` or ``(H, W, 3)`` in 0..1; where it stands in :meth:`uris`."""
        uri = "data:image/png;base64," + base64.b64encode(png(reduced(image))).decode()
        return self._places.setdefault(uri, len(self._places))

    def uris(self) -> list[str]:
        """All pictures so far."""
        return list(self._places)


def reduced(image: Tensor) -> Tensor:
    """The picture, ``(H, W)`` or ``(H, W, 3)``, its longer side at most ``LONGEST`` pixels, means of what they replace.

    Example:
        >>> import torch
        >>> reduced(torch.rand(512, 256, 3)).shape
        torch.Size([128, 64, 3])
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest <= LONGEST:
        return image
    size = max(1, round(height * LONGEST / longest)), max(1, round(width * LONGEST / longest))
    channels = image.reshape(height, width, -1).permute(2, 0, 1)
    return F.adaptive_avg_pool2d(channels, size).permute(1, 2, 0).reshape(*size, *image.shape[2:])


def png(image: Tensor) -> bytes:
    r"""A PNG file, 8 bits a channel, of a picture ``(H, W)`` or ``(H, W, 3)`` in 0..1.

    Example:
        >>> import torch
        >>> png(torch.rand(4, 5))[:8]
        b'\x89PNG\r\n\x1a\n'
    """
    pixels = (image * 255).round().byte().numpy()
    height, width = pixels.shape[:2]
    channels = pixels.reshape(height, width, -1)
    plain = channels.reshape(height, -1)
    differences = np.diff(channels, axis=1, prepend=np.zeros_like(channels[:, :1])).reshape(height, -1)  # modulo 256
    filtered = [np.insert(rows, 0, number, axis=1).tobytes() for number, rows in ((0, plain), (1, differences))]
    shortest = min((zlib.compress(rows, 9) for rows in filtered), key=len)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", shortest), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
