"""Versions of what numbers may depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Versions of what numbers may depend on."""
    packages = ("stride-lightning", "torch", "lightning", "numpy", "scipy")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}
