"""Every wording of the package's errors, warnings and announcements, read from the source without running it."""

import ast
import functools
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import stride_lightning

PACKAGE = Path(stride_lightning.__file__).parent
#: Functions that show their first argument to a user.
_SPEAKERS = {"warn", "rank_zero_warn", "rank_zero_info", "announce"}
#: A text of as many words that a message takes up from elsewhere is a wording of its own; a shorter one just varies.
_PROSE = 4
#: A wording with fewer letters is sought as a whole message only, not inside other messages.
_FEW_LETTERS = 12
#: How many assignments, properties and functions are followed from a message to its texts.
_DEPTH = 5
_LITERAL = ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp


@dataclass(frozen=True)
class Template:
    """One wording: a message, or a sentence that messages take up, with its parts that vary left open.

    Args:
        file: Path below the package's folder.
        lines: The first and last line of the statement that shows the message, or of the sentence.
        text: The wording, with ``{source}`` for each open part.
        pattern: A regular expression of the messages, in one line.
    """

    file: str
    lines: tuple[int, int]
    text: str
    pattern: str

    def fits(self, message):
        """Whether the message, with or without the name of its error in front, has this wording or has it inside."""
        whole, part = _compiled(self.pattern)
        message = squeezed(message)
        return bool(whole.fullmatch(message) or (self._is_long and part.search(message)))

    @property
    def _is_long(self):
        return _num_letters(self.pattern.replace(r"\s*", "")) >= _FEW_LETTERS


@functools.cache
def squeezed(text):
    """The text in one line."""
    return " ".join(text.split())


@functools.cache
def templates(folder=PACKAGE):
    """All wordings below a folder, file by file in the order of the source."""
    package = _Package(folder)
    wordings = {}
    for module in package.modules.values():
        for statement, message, scope in module.messages():
            reader = _Reader(package, module, scope)
            parts = reader.parts(message)
            if any(is_constant and re.search("[a-zA-Z]{3}", text) for is_constant, text in parts):
                reader.sentences.append((module, statement, parts))
            for place, node, sentence in reader.sentences:
                wordings[place.file, node.lineno, node.col_offset] = _template(place, node, sentence)
    return [wordings[place] for place in sorted(wordings)]


def _template(module, node, parts):
    text = squeezed("".join(part if is_constant else f"{{{part}}}" for is_constant, part in parts))
    pattern = "".join(re.escape(part) if is_constant else ".*" for is_constant, part in parts)
    return Template(module.file, (node.lineno, node.end_lineno), text, re.sub(r"(?:\\?\s)+", r"\\s*", pattern))


@functools.cache
def _compiled(pattern):
    return re.compile(rf"(?:\w+: )?{pattern}"), re.compile(pattern)


class _Package:
    """The modules by their paths, and what is known of attributes by their names."""

    def __init__(self, folder):
        self.modules = {}
        for path in sorted(folder.rglob("*.py")):
            module = _Module(path, path.relative_to(folder).as_posix())
            self.modules[module.file] = module
        #: Name of an attribute -> expressions that are assigned to it or that a property of this name returns.
        self.attributes = defaultdict(list)
        #: Name of a function -> calls of it.
        self.calls = defaultdict(list)
        for module in self.modules.values():
            for scope in module.scopes:
                if "property" in map(_name, getattr(scope, "decorator_list", ())):
                    self.attributes[scope.name] += [(module, scope, value) for value in _returned(scope)]
                for target, value in _assignments(scope):
                    if isinstance(target, ast.Attribute):
                        self.attributes[target.attr].append((module, scope, value))
                for node in _inside(scope):
                    if isinstance(node, ast.Call):
                        self.calls[_name(node.func)].append((module, scope, node))


class _Module:
    def __init__(self, path, file):
        self.file = file
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(self.tree))
        self.functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        self.classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        self.scopes = [self.tree, *(node for node in nodes if isinstance(node, ast.FunctionDef))]
        #: Imported name -> (file, name there).
        self.imported = {
            alias.asname or alias.name: ("/".join(node.module.split(".")[1:]) + ".py", alias.name)
            for node in nodes
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stride_lightning.")
            for alias in node.names
        }

    def messages(self):
        """Each statement that shows a message, the expression of the message, and the function around them."""
        for scope in self.scopes:
            for node in _inside(scope):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    yield node, node.exc, scope
                elif isinstance(node, ast.Call) and _name(node.func) in _SPEAKERS and node.args:
                    yield node, node.args[0], scope


class _Reader:
    """What an expression is as a text: a list of parts, ``(True, text)`` or ``(False, source of what varies)``.

    Sentences that can stand for one of the open parts are collected beside it, each with the place it is written at.
    """

    def __init__(self, package, module, scope, bound=None, sentences=None, depth=0):
        self.package, self.module, self.scope, self.depth = package, module, scope, depth
        #: Parts of the arguments that a call gave to this function.
        self.bound = bound or {}
        self.sentences = [] if sentences is None else sentences

    def parts(self, node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [(True, node.value)]
        if isinstance(node, ast.JoinedStr):
            return [part for value in node.values for part in self.parts(value)]
        if isinstance(node, ast.FormattedValue):
            return _open(node.value) if node.format_spec or node.conversion != -1 else self.parts(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.parts(node.left) + self.parts(node.right)
        if isinstance(node, ast.IfExp):
            return self._one_of(node, [self._here(node.body), self._here(node.orelse)])
        if isinstance(node, ast.BoolOp):
            return self._one_of(node, list(map(self._here, node.values)))
        if isinstance(node, ast.Name):
            return self._of_name(node)
        if isinstance(node, ast.Attribute):
            return self._one_of(node, self.package.attributes[node.attr])
        if isinstance(node, ast.Call):
            return self._of_call(node)
        return _open(node)

    def _here(self, node):
        return self.module, self.scope, node

    def _one_of(self, node, expressions, bound=None, is_open=False):
        """The parts of the only expression, or an open part that stands for one of several."""
        if self.depth >= _DEPTH:
            return _open(node)
        texts = []
        for module, scope, value in expressions:
            values = self.bound if bound is None and scope is self.scope else bound
            reader = _Reader(self.package, module, scope, values, self.sentences, self.depth + 1)
            texts.append((module, value, reader.parts(value)))
        if len(texts) == 1 and not is_open and any(is_constant for is_constant, _ in texts[0][2]):
            return texts[0][2]
        self.sentences += [(module, value, parts) for module, value, parts in texts if _is_prose(parts)]
        return _open(node)

    def _of_name(self, node):
        if node.id in self.bound:
            return self.bound[node.id]
        if isinstance(self.scope, ast.FunctionDef) and node.id in _parameters(self.scope):
            calls = self.package.calls[self.scope.name]
            values = [(module, scope, _arguments(self.scope, call).get(node.id)) for module, scope, call in calls]
            # Callers that are not known may give something else, so even a single text is one of several.
            return self._one_of(node, [value for value in values if isinstance(value[2], _LITERAL)], is_open=True)
        scopes = [(self.module, self.scope), (self.module, self.module.tree)]
        file, name = self.module.imported.get(node.id, (None, None))
        if file in self.package.modules:
            scopes.append((self.package.modules[file], self.package.modules[file].tree))
        for module, scope in scopes:
            sought = node.id if module is self.module else name
            values = [v for target, v in _assignments(scope) if isinstance(target, ast.Name) and target.id == sought]
            if values:
                return self._one_of(node, [(module, scope, value) for value in values])
        return _open(node)

    def _of_call(self, node):
        """The message of an exception, or what a function of the package returns."""
        name = _name(node.func)
        file, name = self.module.imported.get(name, (self.module.file, name))
        module = self.package.modules.get(file, self.module)
        if name in module.functions:
            function = module.functions[name]
            expressions = [(module, function, value) for value in _returned(function)]
            arguments = {name: self.parts(value) for name, value in _arguments(function, node).items()}
            return self._one_of(node, expressions, arguments)
        if name in module.classes or (name or "").endswith(("Error", "Exception")):
            return max(map(self.parts, node.args), key=_num_constant, default=_open(node))
        return _open(node)


def _parameters(function):
    arguments = function.args
    return [item.arg for item in [*arguments.args, *arguments.kwonlyargs] if item.arg not in ("self", "cls")]


def _arguments(function, call):
    """Expressions that a call, or a default, gives to the parameters of a function."""
    names = [item.arg for item in function.args.args if item.arg not in ("self", "cls")]
    defaults = zip(reversed(names), reversed(function.args.defaults), strict=False)
    given = zip(names, call.args, strict=False)
    return dict(defaults) | dict(given) | {item.arg: item.value for item in call.keywords if item.arg}


def _inside(scope):
    """Nodes of a function or module, without those of functions inside it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _inside(child)


@functools.cache
def _assignments(scope):
    """Pairs of a target and the expression that is assigned to it."""
    pairs = []
    for node in _inside(scope):
        if isinstance(node, ast.Assign):
            pairs += [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            pairs.append((node.target, node.value))
    return pairs


def _returned(function):
    return [node.value for node in _inside(function) if isinstance(node, ast.Return) and node.value is not None]


def _name(node):
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _open(node):
    return [(False, ast.unparse(node))]


def _num_letters(text):
    return sum(map(str.isalpha, text))


def _num_constant(parts):
    return sum(len(text) for is_constant, text in parts if is_constant)


def _is_prose(parts):
    return len(re.findall("[a-zA-Z]{2,}", " ".join(text for is_constant, text in parts if is_constant))) >= _PROSE
