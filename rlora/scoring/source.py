"""Whether a reward function takes text or chat messages, told by its source.

The completion is followed through the statements of the function, and of functions of its directory that it calls. A
function takes messages where it does with an item of the completion what it could not do with a string:
`item["content"]`, `item.get(...)`, `item.content`, `case {"content": text}`. So a function that reads text is never
mistaken, also where it reads the "content" of something else, such as `json.loads(completion)`.

Values that are followed; anything else is None:

    int      derived from the completion: 0 a message, 1 a conversation, 2 a list of conversations
    str      a text of the source, such as a key
    tuple    a list or tuple whose items are known one by one
    Many     a list of items that are alike
    Fields   a dict whose keys are known
    _Known   an object of a module
    _Local   a function whose source is known
"""

import ast
import functools
import inspect
import linecache
import operator
import os
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

_SAME = frozenset(
    ["list", "tuple", "reversed", "sorted", "iter", "copy", "deepcopy", "dict", "deque", "islice", "chain"]
)
_ITEM = frozenset(["next", "max", "min", "choice", "from_iterable", "pop", "popleft", "__getitem__"])
_LIBRARY = _SAME | _ITEM | {"zip", "zip_longest", "enumerate", "map", "starmap", "filter", "filterfalse", "takewhile"}
_LIBRARY |= {"dropwhile", "itemgetter", "attrgetter"}  # classes among them are followed by their names
_ADD = frozenset(["append", "appendleft", "add", "insert", "extend"])
_MOST_CALLS, _DEEPEST = 1000, 6  # calls that are followed, and calls within calls
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Value = Any


@dataclass(frozen=True)
class Many:
    """A list of items that are alike."""

    item: _Value


@dataclass(frozen=True)
class Fields:
    """A dict whose keys are known."""

    fields: Mapping[str, _Value]


@dataclass(frozen=True, eq=False)
class _Known:
    """An object of a module, or where `made`, an instance of that class."""

    object: Any
    made: bool = False


@dataclass(frozen=True, eq=False)
class _Local:
    """A function whose source is known."""

    node: _Function
    names: Mapping[str, Any]  # of its module and its closure
    scope: "_Scope | None" = None  # the call of the function that it is defined in
    first: tuple[_Value, ...] = ()  # arguments before all others, such as `self`


@dataclass(frozen=True, eq=False)
class _Case:
    """A case of a `match` statement, as a statement."""

    case: ast.match_case
    subject: _Value


@dataclass
class _Budget:
    """Calls that may still be followed; only functions of the directory are."""

    directory: str
    calls: int = _MOST_CALLS
    depth: int = 0


def takes_messages(function: Any, given: Mapping[str, _Value]) -> bool:
    """Whether a function that gets these values by name reads them as messages; False without its source."""
    plain, first = _plain(function)
    node = _node(plain.__code__) if plain else None
    if not plain or not node:
        return False
    scope = _Scope({}, {}, _Budget(os.path.dirname(plain.__code__.co_filename)))
    with suppress(RecursionError):
        scope.follow(_Local(node, _names(plain), first=first), [], given)
    return scope.reads


class _Scope:
    """The variables of one call of a function, and what it does with them."""

    def __init__(self, names: Mapping[str, Any], values: Mapping[str, _Value], budget: _Budget) -> None:
        self.names, self.values, self.budget = names, dict(values), budget
        self.reads = False  # something that only messages have
        self.takes_text = False  # it asks isinstance(completion, str), and so takes both
        self.returned: list[_Value] = []

    def follow(self, called: _Local, args: Sequence[_Value], keywords: Mapping[str, _Value]) -> _Value:
        """What a function returns."""
        if not self.budget.calls or self.budget.depth == _DEEPEST:
            return None
        self.budget.calls -= 1
        self.budget.depth += 1
        scope = _Scope(called.names, called.scope.values if called.scope else {}, self.budget)
        scope._bind_parameters(called.node.args, [*called.first, *args], keywords)
        if isinstance(called.node, ast.Lambda):
            scope.returned.append(scope.value(called.node.body))
        else:
            scope._run(called.node.body)
        self.budget.depth -= 1
        self.reads |= scope.reads and not scope.takes_text
        return _joined(*scope.returned)

    def _bind_parameters(
        self, parameters: ast.arguments, args: Sequence[_Value], keywords: Mapping[str, _Value]
    ) -> None:
        places = [each.arg for each in (*parameters.posonlyargs, *parameters.args)]
        names = [*places, *(each.arg for each in parameters.kwonlyargs)]
        defaults = dict(zip(reversed(names), reversed([*parameters.defaults, *parameters.kw_defaults]), strict=False))
        self.values |= {name: self.value(node) if (node := defaults.get(name)) else None for name in names}
        self.values |= dict(zip(places, args, strict=False))
        self.values |= {name: keywords[name] for name in names if name in keywords}
        if parameters.vararg:
            self.values[parameters.vararg.arg] = tuple(args[len(places) :])
        if parameters.kwarg:
            rest = {name: value for name, value in keywords.items() if name not in names}
            self.values[parameters.kwarg.arg] = Fields(rest)

    # Statements

    def _run(self, statements: Sequence[ast.AST | _Case]) -> None:
        for statement in statements:
            self._do(statement)

    def _do(self, node: ast.AST | _Case) -> None:  # noqa: PLR0912
        match node:
            case ast.Assign(targets, value):
                found = self.value(value)
                for target in targets:
                    self._bind(target, found)
            case ast.AnnAssign(target, _, ast.expr() as value):
                self._bind(target, self.value(value))
            case ast.AugAssign(ast.Name(name), _, value):
                self.values[name] = _joined(self.values.get(name), self.value(value))
            case ast.Return(ast.expr() as value):
                self.returned.append(self.value(value))
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name):
                self.values[name] = self._defined(node)
            case ast.If(test, body, orelse):
                self.value(test)
                self._branch(body, orelse)
            case ast.For(target, iterable, body, orelse) | ast.AsyncFor(target, iterable, body, orelse):
                self._loop(body, target, iterable)
                self._run(orelse)
            case ast.While(test, body, orelse):
                self._loop([test, *body])
                self._run(orelse)
            case ast.Try(body, handlers, orelse, final) | ast.TryStar(body, handlers, orelse, final):
                self._branch(body, [])
                self._branch(orelse, *(each.body for each in handlers))
                self._run(final)
            case ast.Match(subject, cases):
                found = self.value(subject)
                self._branch([], *([_Case(each, found)] for each in cases))
            case _Case(case, subject):
                self._match(case.pattern, subject)
                self._run([*([case.guard] if case.guard else []), *case.body])
            case ast.withitem(context, target):
                found = self.value(context)
                if target:
                    self._bind(target, found)
            case ast.expr():
                self.value(node)
            case ast.AST():
                self._run(list(ast.iter_child_nodes(node)))

    def _branch(self, *blocks: Sequence[ast.AST | _Case]) -> None:
        """Run one of several blocks: variables may have the value of any."""
        before, after = self.values, list[dict[str, _Value]]()
        for block in blocks:
            self.values = dict(before)
            self._run(block)
            after.append(self.values)
        names = {name for values in after for name in values}
        self.values = {name: _joined(*(values.get(name) for values in after)) for name in names}

    def _loop(self, body: Sequence[ast.AST], target: ast.expr | None = None, iterable: ast.expr | None = None) -> None:
        """Twice, because a variable that is bound below may be used above."""
        for _ in range(2):
            if target and iterable:
                self._bind(target, _items(self.value(iterable)))
            self._branch([], body)

    def _bind(self, target: ast.AST, value: _Value) -> None:
        match target:
            case ast.Name(name):
                self.values[name] = value
            case ast.Starred(inner):
                self._bind(inner, value)
            case ast.Tuple(targets) | ast.List(targets):
                for inner, item in zip(targets, _unpacked(targets, value, ast.Starred), strict=True):
                    self._bind(inner, item)
            case _:
                self._run(list(ast.iter_child_nodes(target)))

    def _match(self, pattern: ast.pattern, value: _Value) -> None:  # noqa: PLR0912
        match pattern:
            case ast.MatchMapping(keys, patterns):
                for key, inner in zip(keys, patterns, strict=True):
                    self._match(inner, self._item(value, self.value(key)))
            case ast.MatchSequence(patterns):
                for inner, item in zip(patterns, _unpacked(patterns, value, ast.MatchStar), strict=True):
                    self._match(inner, item)
            case ast.MatchAs(inner, name):
                if inner:
                    self._match(inner, value)
                if name:
                    self.values[name] = value
            case ast.MatchStar(str() as name):
                self.values[name] = value
            case ast.MatchOr(patterns):
                for inner in patterns:
                    self._match(inner, value)
            case ast.MatchClass(kind, patterns, names, named):
                self.takes_text |= value == 1 and isinstance(kind, ast.Name) and kind.id == "str"
                for inner in patterns:
                    self._match(inner, value)
                for name, inner in zip(names, named, strict=True):
                    self._match(inner, self._attribute(value, name))

    # Expressions

    def value(self, node: ast.expr | None) -> _Value:  # noqa: PLR0912
        match node:
            case ast.Name(name):
                return self.values[name] if name in self.values else _known(self.names.get(name))
            case ast.Constant(str() as text):
                return text
            case ast.Attribute(inner, name):
                return self._attribute(self.value(inner), name)
            case ast.Subscript(inner, ast.Slice()):
                found = self.value(inner)
                return _list_of(_items(found)) if isinstance(found, tuple) else found
            case ast.Subscript(inner, key):
                number = key.value if isinstance(key, ast.Constant) and isinstance(key.value, int) else None
                return self._item(self.value(inner), self.value(key), number)
            case ast.Call(ast.Name("isinstance"), [inner, kinds]):
                named = {each.id for each in ast.walk(kinds) if isinstance(each, ast.Name)}
                self.takes_text |= self.value(inner) == 1 and "str" in named
            case ast.Call():
                return self._call(node)
            case ast.Tuple(parts) | ast.List(parts) | ast.Set(parts):
                values = [self.value(part) for part in parts]
                starred = [isinstance(part, ast.Starred) for part in parts]
                items = [_items(item) if star else item for item, star in zip(values, starred, strict=True)]
                return _list_of(_joined(*items)) if any(starred) else tuple(values)
            case ast.Dict(keys, parts):
                return self._dict(keys, [self.value(part) for part in parts])
            case ast.ListComp(item, loops) | ast.GeneratorExp(item, loops) | ast.SetComp(item, loops):
                return _list_of(self._comprehended(loops, item))
            case ast.DictComp(key, item, loops):
                self._comprehended(loops, key, item)
            case ast.IfExp(test, one, other):
                self.value(test)
                return _joined(self.value(one), self.value(other))
            case ast.BoolOp(_, parts):
                return _joined(*map(self.value, parts))
            case ast.BinOp(one, ast.Add(), other):
                return _concatenated(self.value(one), self.value(other))
            case ast.NamedExpr(target, inner):
                found = self.value(inner)
                self._bind(target, found)
                return found
            case ast.Await(inner) | ast.Starred(inner):
                return self.value(inner)
            case ast.Lambda():
                return self._defined(node)
            case ast.Compare(ast.Call(ast.Name("type"), [inner]), _, [ast.Name("str")]):
                self.takes_text |= self.value(inner) == 1
            case ast.AST():
                self._run(list(ast.iter_child_nodes(node)))
        return None

    def _comprehended(self, loops: Sequence[ast.comprehension], *items: ast.expr) -> _Value:
        before = dict(self.values)
        for loop in loops:
            self._bind(loop.target, _items(self.value(loop.iter)))
            self._run(loop.ifs)
        found = [self.value(item) for item in items]
        self.values = before
        return found[-1]

    def _defined(self, node: _Function) -> _Local:
        """A function within this one. It is run once by itself, for it may be called where nobody sees it."""
        made = _Local(node, self.names, self)
        self.follow(made, [], {})
        return made

    def _dict(self, keys: Sequence[ast.expr | None], values: Sequence[_Value]) -> _Value:
        pairs = list(zip(keys, values, strict=True))
        if any(key is None and value == 0 for key, value in pairs):  # {**message}
            return 0
        known = [(self.value(key), value) for key, value in pairs if key]
        return Fields({key: value for key, value in known if isinstance(key, str)})

    def _item(self, value: _Value, key: _Value, number: int | None = None) -> _Value:
        """value[key]"""
        if isinstance(value, Fields):
            return value.fields.get(key) if isinstance(key, str) else None
        if isinstance(key, str):
            self.reads |= value == 0
            return None
        if isinstance(value, tuple) and number is not None and number < len(value):
            return value[number]
        return _items(value)

    def _attribute(self, value: _Value, name: str) -> _Value:
        """value.name"""
        if value == 0 and not hasattr(str, name):
            self.reads = True
        return _attribute(value, name) if isinstance(value, _Known) else None

    def _call(self, node: ast.Call) -> _Value:
        args = [_items(self.value(a)) if isinstance(a, ast.Starred) else self.value(a) for a in node.args]
        keywords = {each.arg or "": self.value(each.value) for each in node.keywords}
        if isinstance(node.func, ast.Attribute):
            receiver, name = self.value(node.func.value), node.func.attr
            if name in _ADD and isinstance(node.func.value, ast.Name) and args:
                return self._add(node.func.value.id, _items(args[-1]) if name == "extend" else args[-1])
            if isinstance(receiver, int | tuple | Many | Fields):
                return self._method(receiver, name, args, keywords)
            called = self._attribute(receiver, name)
        else:
            called, name = self.value(node.func), getattr(node.func, "id", "")
        if isinstance(called, _Local | _Known) and self._is_followed(called):
            return self._applied(called, args, keywords)
        if isinstance(called, _Known):
            name = getattr(called.object, "__name__", name)
            if inspect.isclass(called.object) and name not in _LIBRARY:
                return _Known(called.object, made=True)
        return self._of_library(name, args, keywords)

    def _is_followed(self, called: _Local | _Known) -> bool:
        return _is_getter(called) or self._local(called) is not None

    def _applied(
        self, called: _Value, args: Sequence[_Value], keywords: Mapping[str, _Value] = MappingProxyType({})
    ) -> _Value:
        if _is_getter(called):
            return self._got(called.object, args)
        local = self._local(called)
        if not local or not (local.scope or any(map(_is_derived, (*args, *keywords.values())))):
            return None  # nothing to follow
        return self.follow(local, args, keywords)

    def _local(self, called: _Value) -> _Local | None:
        if isinstance(called, _Local):
            return called
        plain, first = _plain(called.object) if isinstance(called, _Known) and not called.made else (None, ())
        if not plain or os.path.dirname(plain.__code__.co_filename) != self.budget.directory:
            return None
        node = _node(plain.__code__)
        return _Local(node, _names(plain), first=first) if node else None

    def _got(self, getter: Any, args: Sequence[_Value]) -> _Value:
        """Of operator.itemgetter and attrgetter."""
        value = args[0] if args else None
        for key in getter.__reduce__()[1]:
            if isinstance(getter, operator.attrgetter):
                self._attribute(value, key)
            elif isinstance(key, str):
                self._item(value, key)
            else:
                return self._item(value, None, key)
        return None

    def _add(self, name: str, added: _Value) -> None:
        self.values[name] = _list_of(_joined(_items(self.values.get(name)), added))

    def _method(self, value: _Value, name: str, args: Sequence[_Value], keywords: Mapping[str, _Value]) -> _Value:
        """Of a message, a list or a dict."""
        self._attribute(value, name)
        if isinstance(value, Fields):
            if name in ("get", "pop", "setdefault", "__getitem__") and args:
                return self._item(value, args[0])
            found = _joined(*value.fields.values())
            return {"copy": value, "values": Many(found), "items": Many((None, found))}.get(name)
        if name == "copy":
            return value
        if name == "sort":
            return self._of_library("sorted", [value], keywords)
        return self._item(value, *args[:1]) if name == "__getitem__" else _items(value) if name in _ITEM else None

    def _of_library(self, name: str, args: Sequence[_Value], keywords: Mapping[str, _Value]) -> _Value:
        """A function of Python or of some library, by its name."""
        items = [_items(arg) for arg in args]
        self._applied(keywords.get("key"), items[:1] if len(args) == 1 else args[:1])
        match name, args:
            case "enumerate", [_, *_]:
                return Many((None, items[0]))
            case (("zip" | "zip_longest"), _):
                return Many(tuple(items))
            case "getattr", [value, str() as attribute, *_]:
                return self._attribute(value, attribute)
            case "getitem", [value, key]:
                return self._item(value, key)
            case (("itemgetter" | "attrgetter"), [_, *_]):
                keys = [key if isinstance(key, str) else 0 for key in args]
                return _Known(
                    operator.itemgetter(*keys) if name == "itemgetter" else operator.attrgetter(*map(str, keys))
                )
            case "reduce", [function, _, *_]:
                return self._applied(function, [items[1], items[1]])
            case (("map" | "starmap"), [function, *_]):
                return _list_of(self._applied(function, items[1:]))
            case (("filter" | "filterfalse" | "takewhile" | "dropwhile"), [function, kept]):
                self._applied(function, items[1:])
                return kept
        for place, arg in enumerate(args):  # it may call a function with the arguments behind it, as asyncio.to_thread
            self._applied(arg, args[place + 1 :])
        if name in _SAME:
            return _joined(*args)
        return _joined(*(items if len(args) == 1 else args)) if name in _ITEM else None


def _is_derived(value: _Value) -> bool:
    return value is not None and not isinstance(value, str | _Known)


def _is_getter(value: _Value) -> bool:
    return isinstance(value, _Known) and isinstance(value.object, operator.itemgetter | operator.attrgetter)


def _known(value: Any) -> _Value:
    return value if value is None or isinstance(value, str) else _Known(value)


def _list_of(item: _Value) -> _Value:
    if isinstance(item, int):
        return item + 1
    return None if item is None or isinstance(item, str) else Many(item)


def _items(values: _Value) -> _Value:
    match values:
        case int():
            return values - 1 if values else None
        case tuple():
            return _joined(*values)
        case Many(item):
            return item
    return None


def _joined(*values: _Value) -> _Value:
    """What is one of these values."""
    known = [value for value in values if value is not None]
    if not known or all(value == known[0] for value in known):
        return known[0] if known else None
    if derived := [value for value in known if isinstance(value, int)]:
        return min(derived)
    if all(isinstance(value, tuple) and len(value) == len(known[0]) for value in known):
        return tuple(_joined(*items) for items in zip(*known, strict=True))
    if lists := [value for value in known if isinstance(value, tuple | Many)]:
        return _list_of(_joined(*map(_items, lists)))
    return known[0]


def _concatenated(one: _Value, other: _Value) -> _Value:
    return one + other if isinstance(one, tuple) and isinstance(other, tuple) else _joined(one, other)


def _unpacked(targets: Sequence[ast.AST], value: _Value, star: type[ast.AST]) -> list[_Value]:
    """The value of each target that a list or tuple is unpacked into; one of them may have a star."""
    stars = [place for place, target in enumerate(targets) if isinstance(target, star)]
    if isinstance(value, tuple) and not stars and len(value) == len(targets):
        return list(value)
    if isinstance(value, tuple) and stars and len(value) >= len(targets) - 1:
        end = len(value) - (len(targets) - 1 - stars[0])
        return [*value[: stars[0]], value[stars[0] : end], *value[end:]]
    item = _items(value)
    return [_list_of(item) if isinstance(target, star) else item for target in targets]


def _attribute(known: _Known, name: str) -> _Value:
    """Of a module, a class or an object, without running code of the user."""
    found = inspect.getattr_static(known.object, name, None)
    is_class = inspect.isclass(known.object)
    if isinstance(found, staticmethod):
        return _Known(found.__func__)
    if isinstance(found, classmethod):
        return _Known(MethodType(found.__func__, known.object if is_class else type(known.object)))
    if isinstance(found, FunctionType) and (known.made or not (is_class or isinstance(known.object, ModuleType))):
        return _Known(MethodType(found, known if known.made else known.object))
    return _known(found)


def _plain(function: Any) -> tuple[FunctionType | None, tuple[_Value, ...]]:
    """The user's own function, out of its partials and decorators, and what it gets first."""
    if isinstance(function, functools.partial):
        plain, first = _plain(function.func)
        return plain, (*first, *[None] * len(function.args))
    if isinstance(function, MethodType):
        plain, first = _plain(function.__func__)
        owner = function.__self__
        return plain, (owner if isinstance(owner, _Known) else _Known(owner), *first)
    if wrapped := inspect.getattr_static(function, "__wrapped__", None):
        return _plain(wrapped)
    if isinstance(function, FunctionType):
        return function, ()
    call = inspect.getattr_static(type(function), "__call__", None)
    return _plain(MethodType(call, function)) if isinstance(call, FunctionType) else (None, ())


def _names(function: FunctionType) -> Mapping[str, Any]:
    """The names of its module and its closure."""
    closure = dict[str, Any]()
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with suppress(ValueError):  # not bound yet
            closure[name] = cell.cell_contents
    return ChainMap(closure, function.__globals__)


@functools.lru_cache(256)
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
