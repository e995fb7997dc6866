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
import sys
import traceback
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar

import cloudpickle

from rlora.records import RloraError

_PYTHON = "python:"  # where the spec of an object begins that nobody else can import


@dataclass(frozen=True)
class Pickled:
    """An object for another process."""

    data: bytes
    lines: Mapping[str, list[str]]  # of source "files" that are in this process only, such as the cells of a notebook


_given: dict[str, Any] = {}  # the objects, or how they were received, by spec


def give(field: str, thing: Any, taken: Collection[str] = ()) -> str:
    """Return the spec that names an object from now on, none of those that are `taken`.

    A later object of the same name takes its place. Raises RloraError where it can't be sent to other processes.
    """
    name, module = getattr(thing, "__qualname__", ""), getattr(thing, "__module__", "")
    if name.isidentifier() and module != "__main__" and getattr(sys.modules.get(module), name, None) is thing:
        return f"{module}:{name}"
    name = (name or type(thing).__name__).rpartition(".")[2].strip("<>")
    names = (f"{_PYTHON}{name}" + (f"-{number}" if number > 1 else "") for number in range(1, len(taken) + 2))
    spec = next(each for each in names if each not in taken)
    _given[spec] = thing
    pickled(field, [spec])  # only checked here
    return spec


def pickled(field: str, specs: Iterable[str]) -> dict[str, Pickled]:
    """Those of the specs that name an object given from Python, for another process to `receive`."""
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
    if spec.startswith(_PYTHON):
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
    """The file that an object's class, function or module stands in; "" for one that stands in none."""
    try:
        return inspect.getfile(thing if inspect.isclass(thing) or inspect.isroutine(thing) else type(thing))
    except (OSError, TypeError):  # of a notebook's cell, or written in C
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
    try:
        _Pickler(data).dump(thing)
    except Exception as error:
        raise RloraError(
            f"{field} = {spec!r}: it can't be sent to the processes that run it ({type(error).__name__}: {error}); let "
            "it build what it holds when it is called first, or name it as path/to/file.py:name"
        ) from error
    file = file_of(thing)
    lines = linecache.getlines(file) if file and not os.path.exists(file) else []
    return Pickled(data.getvalue(), {file: lines} if lines else {})


def _with_its_file(code: CodeType) -> tuple[Any, ...]:
    make, arguments, *_ = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return _made_with_its_file, (code.co_filename, make, arguments)


def _made_with_its_file(file: str, make: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    return make(*arguments).replace(co_filename=file)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Keeps the files that code stands in, which cloudpickle leaves out: errors and sources are told by them."""

    dispatch_table: ClassVar = ChainMap({CodeType: _with_its_file}, cloudpickle.Pickler.dispatch_table)
