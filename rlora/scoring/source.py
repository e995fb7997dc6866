"""Whether a reward function takes text or chat messages, told by its source.

The completion is followed through the statements of the function, and of functions of its directory that it calls. A
function takes messages where it does with an item of the completion what it could not do with a string:
`item["content"]`, `item.get(...)`, `item.content`, `case {"content": text}`. So a function that reads text is never
mistaken, also where it reads the "content" of something else, such as `json.loads(completion)`.
"""

import ast
import inspect
import operator
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from rlora.scoring.source_values import (
    ADD,
    DEEPEST,
    ITEM,
    LIBRARY,
    SAME,
    Budget,
    Case,
    Fields,
    Function,
    Known,
    Local,
    Many,
    Value,
    attribute_of,
    concatenation,
    either_of,
    is_derived,
    is_getter,
    items_of,
    list_of,
    names_of,
    node_of,
    plain_function,
    unpacking,
    value_of,
)


def takes_messages(function: Any, given: Mapping[str, Value]) -> bool:
    """Whether a function that gets these values by name reads them as messages; False without its source."""
    plain, first = plain_function(function)
    node = node_of(plain.__code__) if plain else None
    if not plain or not node:
        return False
    scope = Scope({}, {}, Budget(os.path.dirname(plain.__code__.co_filename)))
    with suppress(RecursionError):
        scope.follow(Local(node, names_of(plain), first=first), [], given)
    return scope.reads


class Scope:
    """The variables of one call of a function, and what it does with them."""

    def __init__(self, names: Mapping[str, Any], values: Mapping[str, Value], budget: Budget) -> None:
        self.names, self.values, self.budget = names, dict(values), budget
        self.reads = False  # something that only messages have
        self.takes_text = False  # it asks isinstance(completion, str), and so takes both
        self.returned: list[Value] = []

    def follow(self, called: Local, args: Sequence[Value], keywords: Mapping[str, Value]) -> Value:
        """What a function returns."""
        if not self.budget.calls or self.budget.depth == DEEPEST:
            return None
        self.budget.calls -= 1
        self.budget.depth += 1
        scope = Scope(called.names, called.scope.values if called.scope else {}, self.budget)
        scope._bind_parameters(called.node.args, [*called.first, *args], keywords)
        if isinstance(called.node, ast.Lambda):
            scope.returned.append(scope.value(called.node.body))
        else:
            scope._run(called.node.body)
        self.budget.depth -= 1
        self.reads |= scope.reads and not scope.takes_text
        return either_of(*scope.returned)

    def _bind_parameters(self, parameters: ast.arguments, args: Sequence[Value], keywords: Mapping[str, Value]) -> None:
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

    def _run(self, statements: Sequence[ast.AST | Case]) -> None:
        for statement in statements:
            self._do(statement)

    def _do(self, node: ast.AST | Case) -> None:  # noqa: PLR0912
        match node:
            case ast.Assign(targets, value):
                found = self.value(value)
                for target in targets:
                    self._bind(target, found)
            case ast.AnnAssign(target, _, ast.expr() as value):
                self._bind(target, self.value(value))
            case ast.AugAssign(ast.Name(name), _, value):
                self.values[name] = either_of(self.values.get(name), self.value(value))
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
                self._branch([], *([Case(each, found)] for each in cases))
            case Case(case, subject):
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

    def _branch(self, *blocks: Sequence[ast.AST | Case]) -> None:
        """Run one of several blocks: variables may have the value of any."""
        before, after = self.values, list[dict[str, Value]]()
        for block in blocks:
            self.values = dict(before)
            self._run(block)
            after.append(self.values)
        names = {name for values in after for name in values}
        self.values = {name: either_of(*(values.get(name) for values in after)) for name in names}

    def _loop(self, body: Sequence[ast.AST], target: ast.expr | None = None, iterable: ast.expr | None = None) -> None:
        """Twice, because a variable that is bound below may be used above."""
        for _ in range(2):
            if target and iterable:
                self._bind(target, items_of(self.value(iterable)))
            self._branch([], body)

    def _bind(self, target: ast.AST, value: Value) -> None:
        match target:
            case ast.Name(name):
                self.values[name] = value
            case ast.Starred(inner):
                self._bind(inner, value)
            case ast.Tuple(targets) | ast.List(targets):
                for inner, item in zip(targets, unpacking(targets, value, ast.Starred), strict=True):
                    self._bind(inner, item)
            case _:
                self._run(list(ast.iter_child_nodes(target)))

    def _match(self, pattern: ast.pattern, value: Value) -> None:  # noqa: PLR0912
        match pattern:
            case ast.MatchMapping(keys, patterns):
                for key, inner in zip(keys, patterns, strict=True):
                    self._match(inner, self._item(value, self.value(key)))
            case ast.MatchSequence(patterns):
                for inner, item in zip(patterns, unpacking(patterns, value, ast.MatchStar), strict=True):
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

    def value(self, node: ast.expr | None) -> Value:  # noqa: PLR0912
        match node:
            case ast.Name(name):
                return self.values[name] if name in self.values else value_of(self.names.get(name))
            case ast.Constant(str() as text):
                return text
            case ast.Attribute(inner, name):
                return self._attribute(self.value(inner), name)
            case ast.Subscript(inner, ast.Slice()):
                found = self.value(inner)
                return list_of(items_of(found)) if isinstance(found, tuple) else found
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
                items = [items_of(item) if star else item for item, star in zip(values, starred, strict=True)]
                return list_of(either_of(*items)) if any(starred) else tuple(values)
            case ast.Dict(keys, parts):
                return self._dict(keys, [self.value(part) for part in parts])
            case ast.ListComp(item, loops) | ast.GeneratorExp(item, loops) | ast.SetComp(item, loops):
                return list_of(self._comprehended(loops, item))
            case ast.DictComp(key, item, loops):
                self._comprehended(loops, key, item)
            case ast.IfExp(test, one, other):
                self.value(test)
                return either_of(self.value(one), self.value(other))
            case ast.BoolOp(_, parts):
                return either_of(*map(self.value, parts))
            case ast.BinOp(one, ast.Add(), other):
                return concatenation(self.value(one), self.value(other))
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

    def _comprehended(self, loops: Sequence[ast.comprehension], *items: ast.expr) -> Value:
        before = dict(self.values)
        for loop in loops:
            self._bind(loop.target, items_of(self.value(loop.iter)))
            self._run(loop.ifs)
        found = [self.value(item) for item in items]
        self.values = before
        return found[-1]

    def _defined(self, node: Function) -> Local:
        """A function within this one. It is run once by itself, for it may be called where nobody sees it."""
        made = Local(node, self.names, self)
        self.follow(made, [], {})
        return made

    def _dict(self, keys: Sequence[ast.expr | None], values: Sequence[Value]) -> Value:
        pairs = list(zip(keys, values, strict=True))
        if any(key is None and value == 0 for key, value in pairs):  # {**message}
            return 0
        known = [(self.value(key), value) for key, value in pairs if key]
        return Fields({key: value for key, value in known if isinstance(key, str)})

    def _item(self, value: Value, key: Value, number: int | None = None) -> Value:
        """value[key]"""
        if isinstance(value, Fields):
            return value.fields.get(key) if isinstance(key, str) else None
        if isinstance(key, str):
            self.reads |= value == 0
            return None
        if isinstance(value, tuple) and number is not None and number < len(value):
            return value[number]
        return items_of(value)

    def _attribute(self, value: Value, name: str) -> Value:
        """value.name"""
        if value == 0 and not hasattr(str, name):
            self.reads = True
        return attribute_of(value, name) if isinstance(value, Known) else None

    def _call(self, node: ast.Call) -> Value:
        args = [items_of(self.value(a)) if isinstance(a, ast.Starred) else self.value(a) for a in node.args]
        keywords = {each.arg or "": self.value(each.value) for each in node.keywords}
        if isinstance(node.func, ast.Attribute):
            receiver, name = self.value(node.func.value), node.func.attr
            if name in ADD and isinstance(node.func.value, ast.Name) and args:
                return self._add(node.func.value.id, items_of(args[-1]) if name == "extend" else args[-1])
            if isinstance(receiver, int | tuple | Many | Fields):
                return self._method(receiver, name, args, keywords)
            called = self._attribute(receiver, name)
        else:
            called, name = self.value(node.func), getattr(node.func, "id", "")
        if isinstance(called, Local | Known) and self._is_followed(called):
            return self._applied(called, args, keywords)
        if isinstance(called, Known):
            name = getattr(called.object, "__name__", name)
            if inspect.isclass(called.object) and name not in LIBRARY:
                return Known(called.object, made=True)
        return self._of_library(name, args, keywords)

    def _is_followed(self, called: Local | Known) -> bool:
        return is_getter(called) or self._local(called) is not None

    def _applied(
        self, called: Value, args: Sequence[Value], keywords: Mapping[str, Value] = MappingProxyType({})
    ) -> Value:
        if is_getter(called):
            return self._got(called.object, args)
        local = self._local(called)
        if not local or not (local.scope or any(map(is_derived, (*args, *keywords.values())))):
            return None  # nothing to follow
        return self.follow(local, args, keywords)

    def _local(self, called: Value) -> Local | None:
        if isinstance(called, Local):
            return called
        plain, first = plain_function(called.object) if isinstance(called, Known) and not called.made else (None, ())
        if not plain or os.path.dirname(plain.__code__.co_filename) != self.budget.directory:
            return None
        node = node_of(plain.__code__)
        return Local(node, names_of(plain), first=first) if node else None

    def _got(self, getter: Any, args: Sequence[Value]) -> Value:
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

    def _add(self, name: str, added: Value) -> None:
        self.values[name] = list_of(either_of(items_of(self.values.get(name)), added))

    def _method(self, value: Value, name: str, args: Sequence[Value], keywords: Mapping[str, Value]) -> Value:
        """Of a message, a list or a dict."""
        self._attribute(value, name)
        if isinstance(value, Fields):
            if name in ("get", "pop", "setdefault", "__getitem__") and args:
                return self._item(value, args[0])
            found = either_of(*value.fields.values())
            return {"copy": value, "values": Many(found), "items": Many((None, found))}.get(name)
        if name == "copy":
            return value
        if name == "sort":
            return self._of_library("sorted", [value], keywords)
        return self._item(value, *args[:1]) if name == "__getitem__" else items_of(value) if name in ITEM else None

    def _of_library(self, name: str, args: Sequence[Value], keywords: Mapping[str, Value]) -> Value:
        """A function of Python or of some library, by its name."""
        items = [items_of(arg) for arg in args]
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
                return Known(
                    operator.itemgetter(*keys) if name == "itemgetter" else operator.attrgetter(*map(str, keys))
                )
            case "reduce", [function, _, *_]:
                return self._applied(function, [items[1], items[1]])
            case (("map" | "starmap"), [function, *_]):
                return list_of(self._applied(function, items[1:]))
            case (("filter" | "filterfalse" | "takewhile" | "dropwhile"), [function, kept]):
                self._applied(function, items[1:])
                return kept
        for place, arg in enumerate(args):  # it may call a function with the arguments behind it, as asyncio.to_thread
            self._applied(arg, args[place + 1 :])
        if name in SAME:
            return either_of(*args)
        return either_of(*(items if len(args) == 1 else args)) if name in ITEM else None
