"""Versions of the packages that numbers depend on."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version

_version = cache(version)  # a look-up reads files


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, by name."""
    packages = ("stride-lightning", "torch", "lightning", "numpy", "scipy")
    return {name: _version(name) for name in packages} | {"python": platform.python_version()}
