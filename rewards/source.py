"""What the source of a reward function says of its argument: whether it takes text or chat messages for it.

Kinds of a value: 0 is a chat message, 1 a conversation, which is a list of messages, 2 a list of conversations.
"""

import ast
import functools
import linecache
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any

_MESSAGE = frozenset(["get", "content", "role"])  # attributes that tell a message from a character
_SAME = frozenset(["list", "tuple", "reversed", "sorted", "iter", "copy", "deepcopy"])
_ITEM = frozenset(["next", "max", "min", "choice"])
_DEPTH = 3  # calls from function to function of a file
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def takes_messages(code: CodeType, names: Mapping[str, Any], argument: str, kind: int) -> bool | None:
    """Whether a function reads an argument of that kind as messages, and not as text too; None without its source.

    It does where it takes `["content"]` or the like of an item, itself or in functions of its file, `names`, that it
    gives it to. Text has no such items, so it is never mistaken.
    """
    found = _node(code)
    return _Reader(code, names, {argument: kind}, _DEPTH).reads(found) if found else None


class _Reader:
    """Follows values of a known kind through a function."""

    def __init__(self, code: CodeType, names: Mapping[str, Any], kinds: dict[str, int], depth: int) -> None:
        self.code, self.names, self.kinds, self.depth = code, names, kinds, depth

    def reads(self, function: _Function) -> bool:
        nodes = list(ast.walk(function))
        for _ in range(2):  # what is bound below may be used above, in a loop
            for node in nodes:
                self._bind_all(node)
        return not any(map(self._asks_for_text, nodes)) and any(map(self._reads_message, nodes))

    def _bind_all(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, self._kind(node.value))
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value:
            self._bind(node.target, self._kind(node.value))
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            self._bind_items(node.target, node.iter)
        elif isinstance(node, ast.Call) and self._called(node) in ("map", "filter"):
            match node.args:
                case [ast.Lambda(arguments), *given]:
                    for parameter, values in zip(arguments.args, given, strict=False):
                        self._bind_items(ast.Name(parameter.arg), values)

    def _bind(self, target: ast.expr, kind: int | None) -> None:
        if isinstance(target, ast.Name) and kind is not None:
            self.kinds[target.id] = kind

    def _bind_items(self, target: ast.expr, values: ast.expr) -> None:
        """A loop's variables."""
        targets = target.elts if isinstance(target, ast.Tuple) else []
        if isinstance(values, ast.Call) and self._called(values) == "enumerate" and len(targets) == 2:
            self._bind_items(targets[1], values.args[0])
        elif isinstance(values, ast.Call) and self._called(values) == "zip":
            for each, of in zip(targets, values.args, strict=False):
                self._bind_items(each, of)
        elif kind := self._kind(values):
            self._bind(target, kind - 1)

    def _kind(self, node: ast.expr) -> int | None:
        match node:
            case ast.Name(name):
                return self.kinds.get(name)
            case ast.Subscript(ast.Name("state"), ast.Constant("completion")):
                return 1  # verifiers'
            case ast.Subscript(value, ast.Slice()):
                return self._kind(value)
            case ast.Subscript(value, item):
                kind = self._kind(value)
                return (
                    kind - 1 if kind and not (isinstance(item, ast.Constant) and isinstance(item.value, str)) else None
                )
            case ast.Call(args=[first, *_]) if self._called(node) in _SAME | _ITEM:
                kind = self._kind(first)
                return kind - (self._called(node) in _ITEM) if kind else None
            case ast.ListComp(elt) | ast.GeneratorExp(elt):
                kind = self._kind(elt)
                return None if kind is None else kind + 1
            case ast.IfExp(_, one, other):
                return next((kind for kind in map(self._kind, (one, other)) if kind is not None), None)
            case ast.BoolOp(_, parts):
                return next((kind for kind in map(self._kind, parts) if kind is not None), None)
        return None

    def _reads_message(self, node: ast.AST) -> bool:
        match node:
            case ast.Subscript(value, ast.Constant(str())):
                return self._kind(value) == 0
            case ast.Attribute(value, name):
                return name in _MESSAGE and self._kind(value) == 0
            case ast.Call(ast.Name(name)) if self.depth:
                return self._gives_on(node, self.names.get(name))
        return False

    def _asks_for_text(self, node: ast.AST) -> bool:
        """isinstance(completion, str): whoever asks takes both."""
        match node:
            case ast.Call(ast.Name("isinstance"), [value, ast.Name("str")]):
                return self._kind(value) == 1
        return False

    def _gives_on(self, call: ast.Call, function: Any) -> bool:
        """Whether another function of the file reads what it gets here."""
        if not isinstance(function, FunctionType) or function.__code__.co_filename != self.code.co_filename:
            return False
        named = [*zip(function.__code__.co_varnames, call.args, strict=False)]
        named += [(each.arg, each.value) for each in call.keywords if each.arg]
        kinds = {name: kind for name, value in named if (kind := self._kind(value)) is not None}
        node = _node(function.__code__) if kinds else None
        return bool(node and _Reader(function.__code__, self.names, kinds, self.depth - 1).reads(node))

    @staticmethod
    def _called(node: ast.Call) -> str:
        return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _node(code: CodeType) -> _Function | None:
    """Where a function stands in its file."""
    linecache.checkcache(code.co_filename)
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    for node in _functions("".join(linecache.getlines(code.co_filename))):
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
        given = tuple(each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
        if (first, getattr(node, "name", "<lambda>"), given) == (code.co_firstlineno, code.co_name, arguments):
            return node
    return None


@functools.lru_cache(16)
def _functions(source: str) -> list[_Function]:
    try:
        return [node for node in ast.walk(ast.parse(source)) if isinstance(node, _Function)]
    except (SyntaxError, ValueError, RecursionError):
        return []
