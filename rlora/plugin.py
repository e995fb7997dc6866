"""Loads what a user plugs in: `module:name`, `path/to/file.py:name`, or an object that was given from Python.

An object is named by a spec too, for a config holds text: `module:name` where others can import it, else `python:name`.
Processes that were not given the object itself receive it pickled.
"""

import importlib
import importlib.util
import inspect
import io
import linecache
import os
import re
import sys
import traceback
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import CodeType
from typing import Any

import cloudpickle

from rlora.records import RloraError

PYTHON = "python:"  # where the spec of an object begins that nobody else can import


@dataclass(frozen=True)
class Pickled:
    """An object for another process."""

    data: bytes
    lines: Mapping[str, list[str]]  # of source "files" that are in this process only, such as the cells of a notebook


_given: dict[str, Any] = {}  # the objects, or how they were received, by spec


def give(thing: Any, spec: str = "") -> str:
    """Return the spec that names an object from now on: `spec`, where a run has known it by that, or one of its own."""
    name, module = getattr(thing, "__qualname__", ""), getattr(thing, "__module__", "")
    if not spec and name.isidentifier() and module != "__main__" and _found(module, name) is thing:
        return f"{module}:{name}"
    if not spec:
        name = re.sub(r"\W", "", (name or type(thing).__name__).rpartition(".")[2])
        specs = (f"{PYTHON}{name}" + (f"_{number}" if number > 1 else "") for number in count(1))
        spec = next(each for each in specs if _given.get(each, thing) is thing)
    _given[spec] = thing
    return spec


def _found(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def pickled(field: str, specs: Iterable[str]) -> dict[str, Pickled]:
    """Return those of the specs that name an object given from Python, for another process to `receive`.

    Raises RloraError where an object can't be pickled.
    """
    return {spec: _pickle(field, spec, _given[spec]) for spec in specs if spec in _given}


def receive(given: Mapping[str, Pickled]) -> None:
    """Have `load` find what another process was given."""
    for each in given.values():
        for file, lines in each.lines.items():
            linecache.cache[file] = len("".join(lines)), None, lines, file
    _given.update(given)


def load(field: str, spec: str) -> Any:
    """The object that a spec names. Raises RloraError where it can't be had.

    A module may lie in the working directory; a file may import what lies beside it.
    """
    if spec.startswith(PYTHON):
        return _loaded_given(field, spec)
    where, _, name = spec.rpartition(":")
    if not where:
        raise RloraError(f"{field} = {spec!r}: write module:name or path/to/file.py:name")
    is_file = where.endswith(".py")
    home = str(Path(where).absolute().parent if is_file else Path.cwd())
    if home not in sys.path:
        sys.path.append(home)  # last: a file called like an installed package must not take its place
    try:
        if is_file:
            file = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert file is not None
            assert file.loader is not None
            module = importlib.util.module_from_spec(file)
            sys.modules.setdefault(file.name, module)  # dataclasses look their module up there
            file.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except FileNotFoundError:
        raise RloraError(f"{field} = {spec!r}: there is no file {where}; give its path from here") from None
    except Exception as error:
        line = at(error, where if is_file else f"{where.replace('.', '/')}.py")
        what = f"importing {where} failed: {type(error).__name__}: {error}"
        raise RloraError(f"{line}{field} = {spec!r}: {what}") from error
    if not hasattr(module, name):
        raise RloraError(f"{field} = {spec!r}: {where} has no {name!r}; it is spelt otherwise or is missing")
    return getattr(module, name)


def where(error: BaseException, *files: str) -> tuple[str, int] | None:
    """The innermost line of these files that an exception came through."""
    wanted = {os.path.abspath(file) for file in files if file}
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((each for each in reversed(lines) if os.path.abspath(each[0]) in wanted), None)


def at(error: BaseException, *files: str) -> str:
    """That line as a message begins with it, "file:line: "; "" where there is none."""
    place = where(error, *files)
    return f"{place[0]}:{place[1]}: " if place else ""


def env_of(plugged: Any, args: Mapping[str, Any]) -> Any:
    """The env that a plugged-in class or function makes with `args`; an env that was given ready-made as it is."""
    if callable(plugged):
        return plugged(**args)
    if args:
        raise RloraError(f"env_args = {dict(args)!r}: the env was given ready-made; leave them out, or give its class")
    return plugged


def file_of(thing: Any) -> str:
    """Return the file that a function, a class or an object's class stands in; "" where there is none."""
    kind = thing if inspect.isclass(thing) or inspect.isroutine(thing) else type(thing)
    if inspect.isclass(kind):  # one that was unpickled names a module of another process, but not its functions
        functions = (each for each in vars(kind).values() if inspect.isfunction(each))
        kind = next((each for each in functions if each.__code__.co_filename != "<string>"), kind)
    try:
        return inspect.getfile(kind)
    except (OSError, TypeError):  # written in C
        return ""


def _loaded_given(field: str, spec: str) -> Any:
    if spec not in _given:
        raise RloraError(
            f"{field} = {spec!r}: it was given from Python, and this process has no such object; give it to "
            "rlora.train once more, or name it as module:name or path/to/file.py:name"
        )
    thing = _given[spec]
    if not isinstance(thing, Pickled):
        return thing
    try:
        return cloudpickle.loads(thing.data)
    except Exception as error:
        raise RloraError(
            f"{field} = {spec!r}: another process can't unpickle it ({type(error).__name__}: {error}); what it imports "
            "has to be found there too"
        ) from error


def _pickle(field: str, spec: str, thing: Any) -> Pickled:
    if isinstance(thing, Pickled):
        return thing
    data = io.BytesIO()
    pickler = _Pickler(data)
    try:
        pickler.dump(thing)
    except Exception as error:
        raise RloraError(
            f"{field} = {spec!r}: it can't be sent to the processes that run it ({type(error).__name__}: {error}); let "
            "it build what it holds when it is called first, or name it as path/to/file.py:name"
        ) from error
    sources = {file: linecache.getlines(file) for file in sorted(pickler.files) if not os.path.exists(file)}
    return Pickled(data.getvalue(), {file: lines for file, lines in sources.items() if lines})


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Keeps the names of the files that code stands in, which cloudpickle leaves out: errors and sources need them."""

    def __init__(self, file: io.BytesIO) -> None:
        self.files: set[str] = set()
        self.dispatch_table = ChainMap({CodeType: self._code}, cloudpickle.Pickler.dispatch_table)
        super().__init__(file)

    def _code(self, code: CodeType) -> tuple[Any, ...]:
        self.files.add(code.co_filename)
        make, arguments, *_ = cloudpickle.Pickler.dispatch_table[CodeType](code)
        return _made_with_its_file, (code.co_filename, make, arguments)


def _made_with_its_file(file: str, make: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    return make(*arguments).replace(co_filename=file)
