"""The source of a test's call that ended in the package, with its plain values in place of their names."""

import ast
import copy
import functools
import inspect
import itertools
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[2]
_MACHINERY = Path(__file__).parent
#: The longest value, in letters of its source, that is shown instead of its name.
_LONGEST = 60


@dataclass(frozen=True)
class Frame:
    """A place in running code: its line, its instruction, and the values of local and of global names."""

    code: types.CodeType
    line: int
    instruction: int
    values: dict[str, Any]
    names: dict[str, Any]

    @classmethod
    def all_of(cls, traceback):
        """Those of an exception, outermost first."""
        frames = []
        while traceback is not None:
            frame = traceback.tb_frame
            place = (traceback.tb_lineno, traceback.tb_lasti)
            frames.append(cls(frame.f_code, *place, frame.f_locals, frame.f_globals))
            traceback = traceback.tb_next
        return frames

    @classmethod
    def all_above(cls, frame):
        """Those that lead to a running one, outermost first."""
        frames = []
        while frame is not None:
            frames.append(cls(frame.f_code, frame.f_lineno, frame.f_lasti, frame.f_locals, frame.f_globals))
            frame = frame.f_back
        return frames[::-1]


def call_of(frames):
    """The last call that the tests make before other code runs, as source, or None where there is none."""
    deepest = None
    for frame in frames:
        if _is_of_tests(frame.code):
            deepest = frame
        elif deepest is not None:
            break
    node = None if deepest is None else _running(deepest)
    return None if node is None else ast.unparse(_Values(deepest).visit(copy.deepcopy(node)))


@functools.cache
def _is_of_tests(code):
    path = Path(code.co_filename)
    return path.is_relative_to(TESTS) and not path.is_relative_to(_MACHINERY)


@functools.cache
def _tree(path):
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def _running(frame):
    """The expression that a frame evaluates: the body of a lambda, or what a statement computes."""
    position = next(itertools.islice(frame.code.co_positions(), frame.instruction // 2, None))
    place = (position[0] or frame.line, position[2] or 0)
    around = [node for node in ast.walk(_tree(frame.code.co_filename)) if _holds(node, place)]
    if frame.code.co_name == "<lambda>":
        return next((node.body for node in reversed(around) if isinstance(node, ast.Lambda)), None)
    statement = next((node for node in reversed(around) if isinstance(node, ast.stmt)), None)
    if hasattr(statement, "body"):  # the head of a `with`, a `for` or an `if`
        return next((node for node in around if isinstance(node, ast.Call)), None)
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute):
        return statement  # its target refuses the value
    return value or getattr(statement, "test", None) or statement


def _holds(node, place):
    if not hasattr(node, "lineno"):
        return False
    return (node.lineno, node.col_offset) <= place < (node.end_lineno, node.end_col_offset)


class _Values(ast.NodeTransformer):
    """Puts the source of plain values in the place of the names that hold them."""

    def __init__(self, frame):
        self.values, self.names = frame.values, frame.names

    def visit_Name(self, node):
        shown = _shown(self.values[node.id]) if node.id in self.values and isinstance(node.ctx, ast.Load) else None
        return shown or node

    def visit_Call(self, node):
        arguments, keywords = [], []
        for argument in node.args:
            values = self._held_by(argument.value) if isinstance(argument, ast.Starred) else None
            if isinstance(values, tuple | list):
                arguments += [_shown(value) or ast.Constant(...) for value in values]
            else:
                arguments.append(self.visit(argument))
        for keyword in node.keywords:
            options = self._options(keyword.value) if keyword.arg is None else None
            if options is None:
                keywords.append(self.visit(keyword))
            else:
                keywords += [ast.keyword(name, value) for name, value in options.items()]
        return ast.copy_location(ast.Call(self.visit(node.func), arguments, keywords), node)

    def visit_IfExp(self, node):
        """The branch that was taken."""
        try:
            is_first = eval(compile(ast.Expression(node.test), "", "eval"), self.names, self.values)
        except Exception:
            return node
        return self.visit(node.body if is_first else node.orelse)

    def _held_by(self, node):
        return self.values.get(node.id, self.names.get(node.id)) if isinstance(node, ast.Name) else None

    def _options(self, node):
        """Sources by name of a dictionary of options, or None."""
        if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
            return {key.value: self.visit(value) for key, value in zip(node.keys, node.values, strict=True)}
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            left, right = self._options(node.left), self._options(node.right)
            return None if left is None or right is None else left | right
        values = self._held_by(node)
        if not isinstance(values, dict):
            return None
        return {name: _shown(value) or ast.Constant(...) for name, value in values.items()}


def _shown(value):
    """Source of a plain value, or None for one that is too long or has no source."""
    source = _written(value)
    return None if source is None or len(source) > _LONGEST else ast.parse(source, mode="eval").body


def _written(value):
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    if type(value) is float:
        return repr(value) if abs(value) < float("inf") else f"float('{value}')"
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        is_plain = value.layout is torch.strided and value.device.type == "cpu"
        return f"torch.tensor({value.tolist()})" if is_plain and value.numel() <= 6 else None
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__name__ if value.__name__.isidentifier() and not hasattr(value, "__self__") else None
    if isinstance(value, tuple | list | dict):
        return _collection(value)
    return None


def _collection(value):
    if type(value) not in (tuple, list, dict) or len(value) > 6:
        return None
    written = [_written(item) for item in (value.values() if isinstance(value, dict) else value)]
    if any(item is None for item in written):
        return None
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {item}" for key, item in zip(value, written, strict=True)) + "}"
    inside = ", ".join(written)
    return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(written) == 1 else ''})"
