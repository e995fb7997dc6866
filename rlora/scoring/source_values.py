"""Abstract values of `source` for the variables of a function, and lookups in Python's objects for them.

A value is one of these, or None for a variable that the analysis does not follow:

    int             derived from the completion: 0 a message, 1 a conversation, 2 a list of conversations
    str             a string constant of the source, such as a key
    tuple           a list or tuple with a value for each item
    Many            a list whose items all have one value
    Fields          a dict with known keys
    PythonObject    an object of a module
    SourceFunction  a function with its source
"""

import ast
import functools
import inspect
import linecache
import operator
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlora.scoring.source import Scope

RETURNS_ARGUMENT = frozenset(
    ["list", "tuple", "reversed", "sorted", "iter", "copy", "deepcopy", "dict", "deque", "islice", "chain"]
)
RETURNS_ITEM = frozenset(["next", "max", "min", "choice", "from_iterable", "pop", "popleft", "__getitem__"])
LIBRARY = RETURNS_ARGUMENT | RETURNS_ITEM
LIBRARY |= {"zip", "zip_longest", "enumerate", "map", "starmap", "filter", "filterfalse", "takewhile"}
LIBRARY |= {"dropwhile", "itemgetter", "attrgetter"}  # classes with these names are followed as functions
ADDS_ITEM = frozenset(["append", "appendleft", "add", "insert", "extend"])
MAX_CALLS, MAX_DEPTH = 1000, 6  # calls to follow, and calls within calls
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Value = Any


@dataclass(frozen=True)
class Many:
    """A list whose items all have one value."""

    item: Value


@dataclass(frozen=True)
class Fields:
    """A dict with known keys."""

    fields: Mapping[str, Value]


@dataclass(frozen=True, eq=False)
class PythonObject:
    """An object of a module, or an instance of `object` if `is_instance`."""

    object: Any
    is_instance: bool = False


@dataclass(frozen=True, eq=False)
class SourceFunction:
    """A function with its source."""

    node: FunctionNode
    names: Mapping[str, Any]  # variables of its module and its closure
    scope: "Scope | None" = None  # the call in which it is defined
    leading: tuple[Value, ...] = ()  # arguments before all others, such as `self`


@dataclass(frozen=True, eq=False)
class MatchCase:
    """A case of a `match` statement, to be run like a statement."""

    case: ast.match_case
    subject: Value


@dataclass
class Budget:
    """Limits of the analysis. Only functions from files in `directory` are followed."""

    directory: str
    calls: int = MAX_CALLS  # remaining number of calls to follow
    depth: int = 0  # calls around the current one


def is_derived(value: Value) -> bool:
    return value is not None and not isinstance(value, str | PythonObject)


def is_getter(value: Value) -> bool:
    return isinstance(value, PythonObject) and isinstance(value.object, operator.itemgetter | operator.attrgetter)


def value_of(value: Any) -> Value:
    return value if value is None or isinstance(value, str) else PythonObject(value)


def list_of(item: Value) -> Value:
    if isinstance(item, int):
        return item + 1
    return None if item is None or isinstance(item, str) else Many(item)


def item_of(values: Value) -> Value:
    match values:
        case int():
            return values - 1 if values else None
        case tuple():
            return union_of(*values)
        case Many(item):
            return item
    return None


def union_of(*values: Value) -> Value:
    """Return the value of a variable that has one of these values."""
    followed = [value for value in values if value is not None]
    if not followed or all(value == followed[0] for value in followed):
        return followed[0] if followed else None
    if derived := [value for value in followed if isinstance(value, int)]:
        return min(derived)
    if all(isinstance(value, tuple) and len(value) == len(followed[0]) for value in followed):
        return tuple(union_of(*items) for items in zip(*followed, strict=True))
    if lists := [value for value in followed if isinstance(value, tuple | Many)]:
        return list_of(union_of(*map(item_of, lists)))
    return followed[0]


def concatenate(left: Value, right: Value) -> Value:
    return left + right if isinstance(left, tuple) and isinstance(right, tuple) else union_of(left, right)


def unpack(targets: Sequence[ast.AST], value: Value, star: type[ast.AST]) -> list[Value]:
    """Return the value of each target of an unpacking. One target may be of the type `star`."""
    stars = [index for index, target in enumerate(targets) if isinstance(target, star)]
    if isinstance(value, tuple) and not stars and len(value) == len(targets):
        return list(value)
    if isinstance(value, tuple) and stars and len(value) >= len(targets) - 1:
        end = len(value) - (len(targets) - 1 - stars[0])
        return [*value[: stars[0]], value[stars[0] : end], *value[end:]]
    item = item_of(value)
    return [list_of(item) if isinstance(target, star) else item for target in targets]


def attribute_of(value: PythonObject, name: str) -> Value:
    """Return an attribute of a module, a class or an object, without running the user's code."""
    attribute = inspect.getattr_static(value.object, name, None)
    is_class = inspect.isclass(value.object)
    if isinstance(attribute, staticmethod):
        return PythonObject(attribute.__func__)
    if isinstance(attribute, classmethod):
        return PythonObject(MethodType(attribute.__func__, value.object if is_class else type(value.object)))
    if isinstance(attribute, FunctionType) and (
        value.is_instance or not (is_class or isinstance(value.object, ModuleType))
    ):
        return PythonObject(MethodType(attribute, value if value.is_instance else value.object))
    return value_of(attribute)


def plain_function(function: Any) -> tuple[FunctionType | None, tuple[Value, ...]]:
    """Return the user's function without partials and decorators, and the arguments that partials and methods add."""
    if isinstance(function, functools.partial):
        plain, leading = plain_function(function.func)
        return plain, (*leading, *[None] * len(function.args))
    if isinstance(function, MethodType):
        plain, leading = plain_function(function.__func__)
        owner = function.__self__
        return plain, (owner if isinstance(owner, PythonObject) else PythonObject(owner), *leading)
    if wrapped := inspect.getattr_static(function, "__wrapped__", None):
        return plain_function(wrapped)
    if isinstance(function, FunctionType):
        return function, ()
    call = inspect.getattr_static(type(function), "__call__", None)
    return plain_function(MethodType(call, function)) if isinstance(call, FunctionType) else (None, ())


def namespace_of(function: FunctionType) -> Mapping[str, Any]:
    """Return the variables of the function's module and closure, by name."""
    closure = dict[str, Any]()
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with suppress(ValueError):  # not bound yet
            closure[name] = cell.cell_contents
    return ChainMap(closure, function.__globals__)


@functools.lru_cache(256)
def node_of(code: CodeType) -> FunctionNode | None:
    """Find a function's syntax tree in its file. Returns None if the source is not available or has changed."""
    linecache.checkcache(code.co_filename)
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    for node in functions_in("".join(linecache.getlines(code.co_filename))):
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        names = tuple(p.arg for p in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
        if (first, getattr(node, "name", "<lambda>"), names) == (code.co_firstlineno, code.co_name, parameters):
            return node
    return None


@functools.lru_cache(16)
def functions_in(source: str) -> list[FunctionNode]:
    try:
        return [node for node in ast.walk(ast.parse(source)) if isinstance(node, FunctionNode)]
    except (SyntaxError, ValueError, RecursionError):
        return []
