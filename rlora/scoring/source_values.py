"""What `source` knows of a value while it reads a function, and what it asks of Python's own objects.

Values that are followed; anything else is None:

    int      derived from the completion: 0 a message, 1 a conversation, 2 a list of conversations
    str      a text of the source, such as a key
    tuple    a list or tuple whose items are known one by one
    Many     a list of items that are alike
    Fields   a dict whose keys are known
    Known   an object of a module
    Local   a function whose source is known
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

SAME = frozenset(
    ["list", "tuple", "reversed", "sorted", "iter", "copy", "deepcopy", "dict", "deque", "islice", "chain"]
)
ITEM = frozenset(["next", "max", "min", "choice", "from_iterable", "pop", "popleft", "__getitem__"])
LIBRARY = SAME | ITEM | {"zip", "zip_longest", "enumerate", "map", "starmap", "filter", "filterfalse", "takewhile"}
LIBRARY |= {"dropwhile", "itemgetter", "attrgetter"}  # classes among them are followed by their names
ADD = frozenset(["append", "appendleft", "add", "insert", "extend"])
MOST_CALLS, DEEPEST = 1000, 6  # calls that are followed, and calls within calls
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Value = Any


@dataclass(frozen=True)
class Many:
    """A list of items that are alike."""

    item: Value


@dataclass(frozen=True)
class Fields:
    """A dict whose keys are known."""

    fields: Mapping[str, Value]


@dataclass(frozen=True, eq=False)
class Known:
    """An object of a module, or where `made`, an instance of that class."""

    object: Any
    made: bool = False


@dataclass(frozen=True, eq=False)
class Local:
    """A function whose source is known."""

    node: Function
    names: Mapping[str, Any]  # of its module and its closure
    scope: "Scope | None" = None  # the call of the function that it is defined in
    first: tuple[Value, ...] = ()  # arguments before all others, such as `self`


@dataclass(frozen=True, eq=False)
class Case:
    """A case of a `match` statement, as a statement."""

    case: ast.match_case
    subject: Value


@dataclass
class Budget:
    """Calls that may still be followed; only functions of the directory are."""

    directory: str
    calls: int = MOST_CALLS
    depth: int = 0


def is_derived(value: Value) -> bool:
    return value is not None and not isinstance(value, str | Known)


def is_getter(value: Value) -> bool:
    return isinstance(value, Known) and isinstance(value.object, operator.itemgetter | operator.attrgetter)


def value_of(value: Any) -> Value:
    return value if value is None or isinstance(value, str) else Known(value)


def list_of(item: Value) -> Value:
    if isinstance(item, int):
        return item + 1
    return None if item is None or isinstance(item, str) else Many(item)


def items_of(values: Value) -> Value:
    match values:
        case int():
            return values - 1 if values else None
        case tuple():
            return either_of(*values)
        case Many(item):
            return item
    return None


def either_of(*values: Value) -> Value:
    """What is one of these values."""
    known = [value for value in values if value is not None]
    if not known or all(value == known[0] for value in known):
        return known[0] if known else None
    if derived := [value for value in known if isinstance(value, int)]:
        return min(derived)
    if all(isinstance(value, tuple) and len(value) == len(known[0]) for value in known):
        return tuple(either_of(*items) for items in zip(*known, strict=True))
    if lists := [value for value in known if isinstance(value, tuple | Many)]:
        return list_of(either_of(*map(items_of, lists)))
    return known[0]


def concatenation(one: Value, other: Value) -> Value:
    return one + other if isinstance(one, tuple) and isinstance(other, tuple) else either_of(one, other)


def unpacking(targets: Sequence[ast.AST], value: Value, star: type[ast.AST]) -> list[Value]:
    """The value of each target that a list or tuple is unpacked into; one of them may have a star."""
    stars = [place for place, target in enumerate(targets) if isinstance(target, star)]
    if isinstance(value, tuple) and not stars and len(value) == len(targets):
        return list(value)
    if isinstance(value, tuple) and stars and len(value) >= len(targets) - 1:
        end = len(value) - (len(targets) - 1 - stars[0])
        return [*value[: stars[0]], value[stars[0] : end], *value[end:]]
    item = items_of(value)
    return [list_of(item) if isinstance(target, star) else item for target in targets]


def attribute_of(known: Known, name: str) -> Value:
    """Of a module, a class or an object, without running code of the user."""
    found = inspect.getattr_static(known.object, name, None)
    is_class = inspect.isclass(known.object)
    if isinstance(found, staticmethod):
        return Known(found.__func__)
    if isinstance(found, classmethod):
        return Known(MethodType(found.__func__, known.object if is_class else type(known.object)))
    if isinstance(found, FunctionType) and (known.made or not (is_class or isinstance(known.object, ModuleType))):
        return Known(MethodType(found, known if known.made else known.object))
    return value_of(found)


def plain_function(function: Any) -> tuple[FunctionType | None, tuple[Value, ...]]:
    """The user's own function, out of its partials and decorators, and what it gets first."""
    if isinstance(function, functools.partial):
        plain, first = plain_function(function.func)
        return plain, (*first, *[None] * len(function.args))
    if isinstance(function, MethodType):
        plain, first = plain_function(function.__func__)
        owner = function.__self__
        return plain, (owner if isinstance(owner, Known) else Known(owner), *first)
    if wrapped := inspect.getattr_static(function, "__wrapped__", None):
        return plain_function(wrapped)
    if isinstance(function, FunctionType):
        return function, ()
    call = inspect.getattr_static(type(function), "__call__", None)
    return plain_function(MethodType(call, function)) if isinstance(call, FunctionType) else (None, ())


def names_of(function: FunctionType) -> Mapping[str, Any]:
    """The names of its module and its closure."""
    closure = dict[str, Any]()
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with suppress(ValueError):  # not bound yet
            closure[name] = cell.cell_contents
    return ChainMap(closure, function.__globals__)


@functools.lru_cache(256)
def node_of(code: CodeType) -> Function | None:
    """Where a function stands in its file."""
    linecache.checkcache(code.co_filename)
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    for node in functions_in("".join(linecache.getlines(code.co_filename))):
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
        given = tuple(each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
        if (first, getattr(node, "name", "<lambda>"), given) == (code.co_firstlineno, code.co_name, arguments):
            return node
    return None


@functools.lru_cache(16)
def functions_in(source: str) -> list[Function]:
    try:
        return [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    except (SyntaxError, ValueError, RecursionError):
        return []
