"""The file of messages holds every wording of the package; how wordings and calls are read."""

import ast
import json
from itertools import chain

import pytest

from tests.helpers.messages import snapshot
from tests.helpers.messages.calls import Frame, call_of
from tests.helpers.messages.templates import PACKAGE, templates

REFUSAL = """
def made(what):
    return f"{what} is odd"
def refuse():
    raise ValueError(made("A layer"))
"""
REASON = """
def speak(reason):
    announce(f"It runs alone: {reason}.")
speak("it has no forward pass")
"""
CHOICE = """
def refuse(model):
    why = "there are no layers here" if model else "there is no model at all"
    raise ValueError(why)
"""
PROPERTY = """
class Scores:
    @property
    def why_none(self):
        return "It holds no scores."
def refuse(scores):
    raise ValueError(scores.why_none)
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('raise ValueError("one " "two")', ["one two"]),
        ('HINT = "give another"\nraise ValueError(f"got {value!r}, " + HINT)', ["got {value}, give another"]),
        (REFUSAL, ["A layer is odd"]),
        (REASON, ["It runs alone: {reason}.", "it has no forward pass"]),
        (CHOICE, ["there are no layers here", "there is no model at all"]),
        (PROPERTY, ["It holds no scores."]),
        ("def passed_on(error):\n    raise ValueError(error)", []),
    ],
    ids=["joined", "constant", "function", "argument", "choice", "property", "open"],
)
def test_wordings_are_read_from_source(tmp_path, source, expected):
    (tmp_path / "module.py").write_text(source)
    assert [each.text for each in templates(tmp_path)] == expected


def test_a_wording_fits_its_messages(tmp_path):
    (tmp_path / "module.py").write_text('raise ValueError(f"`{name}` must be positive,\\n got {value}.")')
    (template,) = templates(tmp_path)
    assert template.fits("ValueError: `k` must be positive, got -1.")
    assert template.fits("Nothing was written. `k` must be positive, got -1.")
    assert not template.fits("ValueError: `k` must not be negative, got -1.")


def load(*args, **options):
    json.loads(*args, **options)


def test_a_call_is_shown_with_its_values():
    text, options = "nothing", {"strict": False}
    for call, expected in (
        (lambda: json.loads(text, **options), "json.loads('nothing', strict=False)"),
        (lambda: load(text), "json.loads('nothing')"),
    ):
        with pytest.raises(ValueError, match="Expecting value") as caught:
            call()
        assert call_of(Frame.all_of(caught.tb)) == expected


def test_the_file_comes_back_as_it_was_written(tmp_path):
    long = "ValueError: " + "a long message " * 20 + "end"
    entries = {"a.py": [("f(1)", long), ("g()", "UserWarning: two\nlines")]}
    unprovoked = {"b.py": ["one {value}", "two"]}
    first, second = tmp_path / "first", tmp_path / "second"
    snapshot.write(entries, unprovoked, first)
    ((_, wrapped), short), unseen = snapshot.read(first)[0]["a.py"], snapshot.read(first)[1]
    assert (wrapped.replace("\n", " "), short, unseen) == (long, ("g()", "UserWarning: two\nlines"), unprovoked)
    snapshot.write(*snapshot.read(first), second)
    assert second.read_text() == first.read_text()


def test_the_file_holds_every_wording_of_the_package():
    entries, unprovoked = snapshot.read()
    messages = {path: [message for _, message in pairs] for path, pairs in entries.items()}
    everywhere = list(chain(*messages.values()))
    unseen = {text for texts in unprovoked.values() for text in texts}
    new = [
        f"{each.file}:{each.lines[0]}: {each.text}"
        for each in templates()
        if each.text not in unseen and not any(map(each.fits, chain(messages.get(each.file, ()), everywhere)))
    ]
    assert not new, f"{snapshot.FILE.name} lacks wordings: run `make messages`.\n" + "\n".join(new)


def test_the_file_holds_no_wording_that_is_gone():
    entries, unprovoked = snapshot.read()
    wordings = {each.text for each in templates()}
    gone = [
        f"{path}: {message}"
        for path, pairs in entries.items()
        for _, message in pairs
        if not any(each.file == path and each.fits(message) for each in templates())
    ]
    gone += [text for texts in unprovoked.values() for text in texts if text not in wordings]
    assert not gone, f"{snapshot.FILE.name} holds wordings that are gone: run `make messages`.\n" + "\n".join(gone)


def test_names_say_what_the_thing_is():
    vague = {"found", "asked", "came", "own", "kept"}
    names = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (getattr(node, field, None) for field in ("id", "arg", "attr", "name"))
        if isinstance(name, str) and name.strip("_") in vague
    ]
    assert not names, "Name the thing: `checkpoints`, `query_gradients`, `saved_record`.\n" + "\n".join(names)
