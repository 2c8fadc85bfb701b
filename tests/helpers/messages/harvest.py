"""A pytest plugin that writes the file of messages from what the tests provoke: ``-p tests.helpers.messages.harvest``.

It hears what ``pytest.raises`` catches, what the package hands to ``warnings.warn``, and what it announces or logs.
"""

import ast
import doctest
import importlib
import pkgutil
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

import stride_lightning
from tests.helpers.messages import snapshot
from tests.helpers.messages.calls import Frame, call_of
from tests.helpers.messages.templates import PACKAGE, squeezed, templates

_ANNOUNCERS = ("announce", "rank_zero_info")
#: Between the package and warnings.warn.
_RELAYS = ("rank_zero.py", "harvest.py")


@dataclass(frozen=True)
class Provoked:
    """A message of one call.

    Args:
        call: Its source.
        kind: Name of the exception or warning.
        message: The message, without what differs from run to run.
        place: ``(file, line)`` of the statement of the package that raised or showed it.
    """

    call: str
    kind: str
    message: str
    place: tuple[str, int] | None = None

    @property
    def text(self):
        return f"{self.kind}: {self.message}" if self.kind else self.message

    def is_from(self, template):
        """Whether the statement of a wording raised or showed the message."""
        if self.place is None:
            return False
        file, line = self.place
        return file == template.file and template.lines[0] <= line <= template.lines[1]

    def order(self, template):
        """Smaller for a clearer example of a wording."""
        is_public = any(f"{name}(" in self.call for name in stride_lightning.__all__)
        num_unclear = self.call.count("...") + self.call.count("*")
        return (
            not self.is_from(template),
            num_unclear,
            not is_public,
            len(self.call),
            len(self.message),
            self.call,
            self.text,
        )


class Harvest:
    """What one process hears."""

    def __init__(self):
        self.provoked = set()

    def hear(self, kind, message, frames, place):
        """Note a message that is on its way to a user from a place of the package."""
        call = None if place is None else call_of(frames)
        if call is not None:
            self.provoked.add(Provoked(call, kind, _same_in_every_run(message), place))

    def hear_error(self, error, traceback):
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        frames = Frame.all_of(traceback)
        self.hear(type(error).__name__, str(message), frames, _place(frames))

    def hear_speech(self, kind, message):
        """Note a warning or an announcement that the package is making now."""
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.endswith(_RELAYS):
            frame = frame.f_back
        frames = Frame.all_above(frame)
        self.hear(kind, str(message), frames, _place(frames[-1:]))


def _place(frames):
    """The innermost of the frames that is in the package, as ``(file, line)``, or None."""
    for frame in reversed(frames):
        path = Path(frame.code.co_filename)
        if path.is_relative_to(PACKAGE):
            return path.relative_to(PACKAGE).as_posix(), frame.line
    return None


def _same_in_every_run(message):
    """The message without this run's folders, addresses, hashes and last digits."""
    message = re.sub(
        re.escape(tempfile.gettempdir()) + r"/pytest-of-[^/]+/pytest-\d+(/popen-gw\d+)?/[^/'\" ]+", "folder", message
    )
    folder = re.escape(tempfile.gettempdir())
    message = re.sub(folder + r"/pytest-of-[^/]+/pytest-\d+(/popen-gw\d+)?/[^/'\" ]+", "folder", message)
    message = re.sub(folder + r"/\w+", "folder", message)
    message = message.replace(str(PACKAGE.parent), "repository")
    message = re.sub(r"0x[0-9a-f]{6,}", "0x...", message)
    message = re.sub(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{12,64}\b", "hash", message)
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    message = re.sub(r"\d+ bytes", "100 bytes", message)
    message = re.sub(r"\d[\d.]* s\b", "1 s", message)
    return re.sub(r"\d+\.\d{3,}(?:e[-+]?\d+)?", lambda match: f"{float(match[0]):.3g}", message)


class _Raises:
    """``pytest.raises(...)`` with someone who listens."""

    def __init__(self, harvest, expected):
        self.harvest, self.expected = harvest, expected

    def __enter__(self):
        return self.expected.__enter__()

    def __exit__(self, kind, error, traceback):
        if error is not None:
            self.harvest.hear_error(error, traceback)
        return self.expected.__exit__(kind, error, traceback)


def _listen(harvest):
    raises, warn = pytest.raises, warnings.warn

    def raises_and_heard(*args, **options):
        expected = raises(*args, **options)
        return _Raises(harvest, expected) if hasattr(expected, "__exit__") else expected

    def warn_and_heard(message, category=None, stacklevel=1, *args, **options):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        harvest.hear_speech(kind.__name__, message)
        return warn(message, category, stacklevel + 1, *args, **options)

    pytest.raises, warnings.warn = raises_and_heard, warn_and_heard
    for module in _modules():
        for name in _ANNOUNCERS:
            if name in vars(module):
                setattr(module, name, _heard(harvest, vars(module)[name]))


def _heard(harvest, announcer):
    def announce_and_heard(message, *args, **options):
        if options.get("show", True):
            harvest.hear_speech("announced", message)
        return announcer(message, *args, **options)

    return announce_and_heard


def _modules():
    for module in pkgutil.walk_packages([str(PACKAGE)], "stride_lightning."):
        yield importlib.import_module(module.name)


def _in_docstrings():
    """Errors that examples in docstrings show."""
    nodes = (node for path in sorted(PACKAGE.rglob("*.py")) for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    for node in nodes:
        text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
        for example in doctest.DocTestParser().get_examples(text or ""):
            if example.exc_msg:
                kind, _, message = example.exc_msg.partition(": ")
                yield Provoked(squeezed(example.source), kind, message.strip())


def choose(provoked, former=()):
    """The clearest example of each wording, and the wordings without any, by file in the order of the source.

    Args:
        provoked: Messages of this run.
        former: Messages of the file before, for wordings that this run does not provoke.
    """
    chosen, unprovoked = {}, defaultdict(list)
    for template in templates():
        from_there = [each for each in provoked if each.is_from(template) and template.fits(each.text)]
        if from_there:
            chosen[template] = min(from_there, key=lambda each: each.order(template))
    # A sentence that several messages take up needs no example of its own where one of them is shown.
    for template in templates():
        if not any(template.fits(each.text) for each in chosen.values()):
            for examples in (provoked, former):
                fitting = [each for each in examples if template.fits(each.text)]
                if fitting:
                    chosen[template] = min(fitting, key=lambda each: each.order(template))
                    break
            else:
                unprovoked[template.file].append(template.text)
    entries = defaultdict(list)
    for template in sorted(chosen, key=lambda each: (each.file, each.lines)):
        pair = (chosen[template].call, chosen[template].text)
        if pair not in entries[template.file]:
            entries[template.file].append(pair)
    return entries, unprovoked


def _misread(provoked):
    """Messages of a statement that its template does not fit: the template is read wrongly from the source."""
    for template in templates():
        heard = {each.text for each in provoked if each.is_from(template)}
        yield from (f"{template.file}:{template.lines[0]}: {text}" for text in sorted(heard) if not template.fits(text))


class _Plugin:
    def __init__(self, config):
        self.config, self.harvest = config, Harvest()
        _listen(self.harvest)

    def pytest_sessionfinish(self, session, exitstatus):
        config = self.config
        if hasattr(config, "workeroutput"):
            config.workeroutput["messages"] = [astuple(each) for each in self.harvest.provoked]
        elif exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self._write()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        for call, kind, message, place in getattr(node, "workeroutput", {}).get("messages", ()):
            self.harvest.provoked.add(Provoked(call, kind, message, tuple(place)))

    def _write(self):
        option = self.config.option
        is_whole = self.config.args_source is not pytest.Config.ArgsSource.ARGS and not (
            option.keyword or option.markexpr
        )
        former = []
        if not is_whole and snapshot.FILE.exists():
            former = [Provoked(call, "", text) for pairs in snapshot.read()[0].values() for call, text in pairs]
        provoked = sorted({*self.harvest.provoked, *_in_docstrings()}, key=repr)
        entries, unprovoked = choose(provoked, former)
        snapshot.write(entries, unprovoked)
        for line in _misread(provoked):
            print(f"Read wrongly from the source: {line}")
        num_shown, num_unprovoked = (sum(map(len, each.values())) for each in (entries, unprovoked))
        print(f"{snapshot.FILE}: {num_shown} messages; {num_unprovoked} that no test provokes")


def pytest_configure(config):
    config.pluginmanager.register(_Plugin(config), "messages")
