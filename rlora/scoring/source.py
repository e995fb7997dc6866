"""Decides from a reward function's source whether it takes text or chat messages.

The completion is followed through the statements of the function, and of functions from its directory that it calls. A
function takes messages if it uses an item of the completion in a way that a string does not allow: `item["content"]`,
`item.get(...)`, `item.content`, `case {"content": text}`. A function that reads text is therefore never mistaken, even
if it reads the "content" of something else, such as `json.loads(completion)`.
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
    ADDS_ITEM,
    LIBRARY,
    MAX_DEPTH,
    RETURNS_ARGUMENT,
    RETURNS_ITEM,
    Budget,
    Fields,
    FunctionNode,
    Many,
    MatchCase,
    PythonObject,
    SourceFunction,
    Value,
    attribute_of,
    concatenate,
    is_derived,
    is_getter,
    item_of,
    list_of,
    namespace_of,
    node_of,
    plain_function,
    union_of,
    unpack,
    value_of,
)


def takes_messages(function: Any, arguments: Mapping[str, Value]) -> bool:
    """Return whether a function reads these arguments, by name, as messages. False if it has no readable source."""
    plain, leading = plain_function(function)
    node = node_of(plain.__code__) if plain else None
    if not plain or not node:
        return False
    scope = Scope({}, {}, Budget(os.path.dirname(plain.__code__.co_filename)))
    with suppress(RecursionError):
        scope.follow(SourceFunction(node, namespace_of(plain), leading=leading), [], arguments)
    return scope.reads_messages


class Scope:
    """Variables of one call of a function, and findings about the use of the variables."""

    def __init__(self, names: Mapping[str, Any], values: Mapping[str, Value], budget: Budget) -> None:
        self.names, self.values, self.budget = names, dict(values), budget
        self.reads_messages = False  # uses an item of the completion as only messages can be used
        self.accepts_text = False  # checks isinstance(completion, str), and so takes both
        self.returned: list[Value] = []

    def follow(self, called: SourceFunction, args: Sequence[Value], keywords: Mapping[str, Value]) -> Value:
        """Follow a call, and return the abstract value that the function returns."""
        if not self.budget.calls or self.budget.depth == MAX_DEPTH:
            return None
        self.budget.calls -= 1
        self.budget.depth += 1
        scope = Scope(called.names, called.scope.values if called.scope else {}, self.budget)
        scope._bind_parameters(called.node.args, [*called.leading, *args], keywords)
        if isinstance(called.node, ast.Lambda):
            scope.returned.append(scope.value(called.node.body))
        else:
            scope._run(called.node.body)
        self.budget.depth -= 1
        self.reads_messages |= scope.reads_messages and not scope.accepts_text
        return union_of(*scope.returned)

    def _bind_parameters(self, parameters: ast.arguments, args: Sequence[Value], keywords: Mapping[str, Value]) -> None:
        positional = [parameter.arg for parameter in (*parameters.posonlyargs, *parameters.args)]
        names = [*positional, *(parameter.arg for parameter in parameters.kwonlyargs)]
        defaults = dict(zip(reversed(names), reversed([*parameters.defaults, *parameters.kw_defaults]), strict=False))
        self.values |= {name: self.value(node) if (node := defaults.get(name)) else None for name in names}
        self.values |= dict(zip(positional, args, strict=False))
        self.values |= {name: keywords[name] for name in names if name in keywords}
        if parameters.vararg:
            self.values[parameters.vararg.arg] = tuple(args[len(positional) :])
        if parameters.kwarg:
            rest = {name: value for name, value in keywords.items() if name not in names}
            self.values[parameters.kwarg.arg] = Fields(rest)

    # Statements

    def _run(self, statements: Sequence[ast.AST | MatchCase]) -> None:
        for statement in statements:
            self._execute(statement)

    def _execute(self, node: ast.AST | MatchCase) -> None:  # noqa: PLR0912
        match node:
            case ast.Assign(targets, value):
                assigned = self.value(value)
                for target in targets:
                    self._bind(target, assigned)
            case ast.AnnAssign(target, _, ast.expr() as value):
                self._bind(target, self.value(value))
            case ast.AugAssign(ast.Name(name), _, value):
                self.values[name] = union_of(self.values.get(name), self.value(value))
            case ast.Return(ast.expr() as value):
                self.returned.append(self.value(value))
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name):
                self.values[name] = self._define(node)
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
                self._branch(orelse, *(handler.body for handler in handlers))
                self._run(final)
            case ast.Match(subject, cases):
                matched = self.value(subject)
                self._branch([], *([MatchCase(case, matched)] for case in cases))
            case MatchCase(case, subject):
                self._match(case.pattern, subject)
                self._run([*([case.guard] if case.guard else []), *case.body])
            case ast.withitem(context, target):
                entered = self.value(context)
                if target:
                    self._bind(target, entered)
            case ast.expr():
                self.value(node)
            case ast.AST():
                self._run(list(ast.iter_child_nodes(node)))

    def _branch(self, *blocks: Sequence[ast.AST | MatchCase]) -> None:
        """Run alternative blocks, and merge the values that variables have after each."""
        initial, results = self.values, list[dict[str, Value]]()
        for block in blocks:
            self.values = dict(initial)
            self._run(block)
            results.append(self.values)
        names = {name for values in results for name in values}
        self.values = {name: union_of(*(values.get(name) for values in results)) for name in names}

    def _loop(self, body: Sequence[ast.AST], target: ast.expr | None = None, iterable: ast.expr | None = None) -> None:
        """Run the body twice, because a variable may be used above the line that binds it."""
        for _ in range(2):
            if target and iterable:
                self._bind(target, item_of(self.value(iterable)))
            self._branch([], body)

    def _bind(self, target: ast.AST, value: Value) -> None:
        match target:
            case ast.Name(name):
                self.values[name] = value
            case ast.Starred(inner):
                self._bind(inner, value)
            case ast.Tuple(targets) | ast.List(targets):
                for inner, item in zip(targets, unpack(targets, value, ast.Starred), strict=True):
                    self._bind(inner, item)
            case _:
                self._run(list(ast.iter_child_nodes(target)))

    def _match(self, pattern: ast.pattern, value: Value) -> None:  # noqa: PLR0912
        match pattern:
            case ast.MatchMapping(keys, patterns):
                for key, inner in zip(keys, patterns, strict=True):
                    self._match(inner, self._item(value, self.value(key)))
            case ast.MatchSequence(patterns):
                for inner, item in zip(patterns, unpack(patterns, value, ast.MatchStar), strict=True):
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
            case ast.MatchClass(kind, patterns, names, keyword_patterns):
                self.accepts_text |= value == 1 and isinstance(kind, ast.Name) and kind.id == "str"
                for inner in patterns:
                    self._match(inner, value)
                for name, inner in zip(names, keyword_patterns, strict=True):
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
                sliced = self.value(inner)
                return list_of(item_of(sliced)) if isinstance(sliced, tuple) else sliced
            case ast.Subscript(inner, key):
                number = key.value if isinstance(key, ast.Constant) and isinstance(key.value, int) else None
                return self._item(self.value(inner), self.value(key), number)
            case ast.Call(ast.Name("isinstance"), [inner, kinds]):
                names = {kind.id for kind in ast.walk(kinds) if isinstance(kind, ast.Name)}
                self.accepts_text |= self.value(inner) == 1 and "str" in names
            case ast.Call():
                return self._call(node)
            case ast.Tuple(parts) | ast.List(parts) | ast.Set(parts):
                values = [self.value(part) for part in parts]
                starred = [isinstance(part, ast.Starred) for part in parts]
                items = [item_of(item) if star else item for item, star in zip(values, starred, strict=True)]
                return list_of(union_of(*items)) if any(starred) else tuple(values)
            case ast.Dict(keys, parts):
                return self._dict(keys, [self.value(part) for part in parts])
            case ast.ListComp(item, loops) | ast.GeneratorExp(item, loops) | ast.SetComp(item, loops):
                return list_of(self._comprehend(loops, item))
            case ast.DictComp(key, item, loops):
                self._comprehend(loops, key, item)
            case ast.IfExp(test, body, orelse):
                self.value(test)
                return union_of(self.value(body), self.value(orelse))
            case ast.BoolOp(_, parts):
                return union_of(*map(self.value, parts))
            case ast.BinOp(left, ast.Add(), right):
                return concatenate(self.value(left), self.value(right))
            case ast.NamedExpr(target, inner):
                assigned = self.value(inner)
                self._bind(target, assigned)
                return assigned
            case ast.Await(inner) | ast.Starred(inner):
                return self.value(inner)
            case ast.Lambda():
                return self._define(node)
            case ast.Compare(ast.Call(ast.Name("type"), [inner]), _, [ast.Name("str")]):
                self.accepts_text |= self.value(inner) == 1
            case ast.AST():
                self._run(list(ast.iter_child_nodes(node)))
        return None

    def _comprehend(self, loops: Sequence[ast.comprehension], *items: ast.expr) -> Value:
        initial = dict(self.values)
        for loop in loops:
            self._bind(loop.target, item_of(self.value(loop.iter)))
            self._run(loop.ifs)
        values = [self.value(item) for item in items]
        self.values = initial
        return values[-1]

    def _define(self, node: FunctionNode) -> SourceFunction:
        """Return a nested function, after following it once without arguments, because its calls can be hidden."""
        function = SourceFunction(node, self.names, self)
        self.follow(function, [], {})
        return function

    def _dict(self, keys: Sequence[ast.expr | None], values: Sequence[Value]) -> Value:
        pairs = list(zip(keys, values, strict=True))
        if any(key is None and value == 0 for key, value in pairs):  # {**message}
            return 0
        items = [(self.value(key), value) for key, value in pairs if key]
        return Fields({key: value for key, value in items if isinstance(key, str)})

    def _item(self, value: Value, key: Value, number: int | None = None) -> Value:
        """Return the abstract value of `value[key]`."""
        if isinstance(value, Fields):
            return value.fields.get(key) if isinstance(key, str) else None
        if isinstance(key, str):
            self.reads_messages |= value == 0
            return None
        if isinstance(value, tuple) and number is not None and number < len(value):
            return value[number]
        return item_of(value)

    def _attribute(self, value: Value, name: str) -> Value:
        """Return the abstract value of `value.name`."""
        if value == 0 and not hasattr(str, name):
            self.reads_messages = True
        return attribute_of(value, name) if isinstance(value, PythonObject) else None

    def _call(self, node: ast.Call) -> Value:
        args = [item_of(self.value(a)) if isinstance(a, ast.Starred) else self.value(a) for a in node.args]
        keywords = {keyword.arg or "": self.value(keyword.value) for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute):
            receiver, name = self.value(node.func.value), node.func.attr
            if name in ADDS_ITEM and isinstance(node.func.value, ast.Name) and args:
                return self._add_item(node.func.value.id, item_of(args[-1]) if name == "extend" else args[-1])
            if isinstance(receiver, int | tuple | Many | Fields):
                return self._call_method(receiver, name, args, keywords)
            called = self._attribute(receiver, name)
        else:
            called, name = self.value(node.func), getattr(node.func, "id", "")
        if isinstance(called, SourceFunction | PythonObject) and self._is_followed(called):
            return self._apply(called, args, keywords)
        if isinstance(called, PythonObject):
            name = getattr(called.object, "__name__", name)
            if inspect.isclass(called.object) and name not in LIBRARY:
                return PythonObject(called.object, is_instance=True)
        return self._call_library(name, args, keywords)

    def _is_followed(self, called: SourceFunction | PythonObject) -> bool:
        return is_getter(called) or self._source_function(called) is not None

    def _apply(
        self, called: Value, args: Sequence[Value], keywords: Mapping[str, Value] = MappingProxyType({})
    ) -> Value:
        if is_getter(called):
            return self._apply_getter(called.object, args)
        function = self._source_function(called)
        if not function or not (function.scope or any(map(is_derived, (*args, *keywords.values())))):
            return None  # no argument to follow
        return self.follow(function, args, keywords)

    def _source_function(self, called: Value) -> SourceFunction | None:
        if isinstance(called, SourceFunction):
            return called
        if isinstance(called, PythonObject) and not called.is_instance:
            plain, leading = plain_function(called.object)
        else:
            plain, leading = None, ()
        if not plain or os.path.dirname(plain.__code__.co_filename) != self.budget.directory:
            return None
        node = node_of(plain.__code__)
        return SourceFunction(node, namespace_of(plain), leading=leading) if node else None

    def _apply_getter(self, getter: Any, args: Sequence[Value]) -> Value:
        """Call an `operator.itemgetter` or `attrgetter`."""
        value = args[0] if args else None
        for key in getter.__reduce__()[1]:
            if isinstance(getter, operator.attrgetter):
                self._attribute(value, key)
            elif isinstance(key, str):
                self._item(value, key)
            else:
                return self._item(value, None, key)
        return None

    def _add_item(self, name: str, item: Value) -> None:
        self.values[name] = list_of(union_of(item_of(self.values.get(name)), item))

    def _call_method(self, value: Value, name: str, args: Sequence[Value], keywords: Mapping[str, Value]) -> Value:
        """Call a method of a message, a list or a dict."""
        self._attribute(value, name)
        if isinstance(value, Fields):
            if name in ("get", "pop", "setdefault", "__getitem__") and args:
                return self._item(value, args[0])
            item = union_of(*value.fields.values())
            return {"copy": value, "values": Many(item), "items": Many((None, item))}.get(name)
        if name == "copy":
            return value
        if name == "sort":
            return self._call_library("sorted", [value], keywords)
        if name == "__getitem__":
            return self._item(value, *args[:1])
        return item_of(value) if name in RETURNS_ITEM else None

    def _call_library(self, name: str, args: Sequence[Value], keywords: Mapping[str, Value]) -> Value:
        """Call a function of Python or of a library. It is recognised by its name."""
        items = [item_of(arg) for arg in args]
        self._apply(keywords.get("key"), items[:1] if len(args) == 1 else args[:1])
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
                return PythonObject(
                    operator.itemgetter(*keys) if name == "itemgetter" else operator.attrgetter(*map(str, keys))
                )
            case "reduce", [function, _, *_]:
                return self._apply(function, [items[1], items[1]])
            case (("map" | "starmap"), [function, *_]):
                return list_of(self._apply(function, items[1:]))
            case (("filter" | "filterfalse" | "takewhile" | "dropwhile"), [function, kept]):
                self._apply(function, items[1:])
                return kept
        for index, arg in enumerate(args):  # such as asyncio.to_thread(function, *arguments)
            self._apply(arg, args[index + 1 :])
        if name in RETURNS_ARGUMENT:
            return union_of(*args)
        return union_of(*(items if len(args) == 1 else args)) if name in RETURNS_ITEM else None
