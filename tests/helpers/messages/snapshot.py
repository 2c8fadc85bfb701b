"""The file of all messages: each wording once, below a call that brings it."""

import textwrap
from pathlib import Path

from tests.helpers.messages.templates import squeezed

FILE = Path(__file__).parents[2] / "messages.txt"
_TITLE = """\
# Errors, warnings and announcements of stride_lightning, each below a call that brings it.
# `make messages` writes this file from a run of the tests: change the source or a test instead.
# `make messages ARGS=tests/metrics` runs these tests only and leaves the other messages as they are.
"""
_UNPROVOKED = "never provoked by a test"
_WIDTH = 116
_INDENT = "    "


def write(entries, unprovoked, file=FILE):
    """The file with ``{path: [(call, message), ...]}``, and with ``{path: [wording, ...]}`` that no test provokes."""
    sections = []
    for path, pairs in entries.items():
        sections.append(f"# {path}")
        sections += [_paragraph(call) + "\n" + _paragraph(message, _INDENT) for call, message in pairs]
    if unprovoked:
        sections.append(f"# {_UNPROVOKED}")
        sections += [
            _paragraph(path) + "\n" + _paragraph(text, _INDENT) for path in unprovoked for text in unprovoked[path]
        ]
    file.write_text("\n\n".join([_TITLE.rstrip(), *sections]) + "\n", encoding="utf-8")


def read(file=FILE):
    """What :func:`write` was given, each call in one line, and each message in lines as wide as the file."""
    entries, unprovoked, path = {}, {}, None
    for block in file.read_text(encoding="utf-8").removeprefix(_TITLE).strip().split("\n\n"):
        if block.startswith("# "):
            path = block.removeprefix("# ")
            continue
        lines = block.splitlines()
        message = "\n".join(line.removeprefix(_INDENT) for line in lines if line.startswith(_INDENT))
        call = squeezed(" ".join(line for line in lines if not line.startswith(_INDENT)))
        if path == _UNPROVOKED:
            unprovoked.setdefault(call, []).append(squeezed(message))
        else:
            entries.setdefault(path, []).append((call, message))
    return entries, unprovoked


def _paragraph(text, indent=""):
    how = {"initial_indent": indent, "subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(squeezed(line), _WIDTH, **how) for line in text.splitlines() if line.strip())
