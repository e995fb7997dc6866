"""Loads plug-ins: `module:name`, `path/to/file.py:name`, or an object that was passed from Python.

A config holds text only, so it names an object by a spec: `module:name` if other processes can import it, else
`python:name`. Processes that do not have such an object receive it pickled.
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

PYTHON = "python:"  # prefix of specs for objects that other processes can't import


@dataclass(frozen=True)
class Pickled:
    """An object that is pickled for another process."""

    data: bytes
    lines: Mapping[str, list[str]]  # source lines of files that only this process has (notebook cells)


_registered: dict[str, Any] = {}  # by spec: objects of this process, or `Pickled` ones of another


def register(plugin: Any, spec: str = "") -> str:
    """Register an object for `load`, and return its spec: `spec` if that is not empty, else a new spec.

    A resumed run passes `spec` to keep its specs. Without `spec`, an object that other processes can import is not
    registered, and has the spec `module:name`.
    """
    name, module = getattr(plugin, "__qualname__", ""), getattr(plugin, "__module__", "")
    if not spec and name.isidentifier() and module != "__main__" and _imported(module, name) is plugin:
        return f"{module}:{name}"
    if not spec:
        name = re.sub(r"\W", "", (name or type(plugin).__name__).rpartition(".")[2])
        candidates = (f"{PYTHON}{name}" + (f"_{number}" if number > 1 else "") for number in count(1))
        spec = next(candidate for candidate in candidates if _registered.get(candidate, plugin) is plugin)
    _registered[spec] = plugin
    return spec


def _imported(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def pickled(field: str, specs: Iterable[str]) -> dict[str, Pickled]:
    """Pickle the registered objects among `specs`, for `receive` in another process. Returns them by spec.

    Raises RloraError, which names the config's `field`, if an object can't be pickled.
    """
    return {spec: _pickle(field, spec, _registered[spec]) for spec in specs if spec in _registered}


def receive(plugins: Mapping[str, Pickled]) -> None:
    """Register objects that `pickled` returned in another process, so that `load` finds them."""
    for plugin in plugins.values():
        for file, lines in plugin.lines.items():
            linecache.cache[file] = len("".join(lines)), None, lines, file
    _registered.update(plugins)


def load(field: str, spec: str) -> Any:
    """Load the object that a spec names. Raises RloraError, which names the config's `field`, if that fails.

    A module can be in the working directory. A file can import modules from its own directory, and is executed at each
    call. The directory is appended to `sys.path`.
    """
    if spec.startswith(PYTHON):
        return _load_registered(field, spec)
    source, _, name = spec.rpartition(":")
    if not source:
        raise RloraError(
            f"{field} = {spec!r}: no module or file before a colon; write module:name or path/to/file.py:name"
        )
    is_file = source.endswith(".py")
    if is_file and not Path(source).exists():
        raise RloraError(f"{field} = {spec!r}: there is no file {source}; check the path")
    directory = str(Path(source).absolute().parent if is_file else Path.cwd())
    if directory not in sys.path:
        sys.path.append(directory)  # last, so that a file with the name of an installed package does not shadow it
    try:
        if is_file:
            file = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert file is not None
            assert file.loader is not None
            module = importlib.util.module_from_spec(file)
            sys.modules.setdefault(file.name, module)  # dataclasses look up their module there
            file.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except Exception as error:
        prefix = location_prefix(error, source if is_file else f"{source.replace('.', '/')}.py")
        fix = "install the missing package, or correct the import" if isinstance(error, ImportError) else "fix the code"
        reason = f"importing {source} failed: {type(error).__name__}: {error}; {fix}"
        raise RloraError(f"{prefix}{field} = {spec!r}: {reason}") from error
    if not hasattr(module, name):
        raise RloraError(f"{field} = {spec!r}: {source} has no {name!r}; check the spelling")
    return getattr(module, name)


def error_location(error: BaseException, *files: str) -> tuple[str, int] | None:
    """Return file and line of the innermost frame of an exception's traceback that is in one of `files`, or None."""
    wanted = {os.path.abspath(file) for file in files if file}
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next(((file, line) for file, line in reversed(lines) if os.path.abspath(file) in wanted), None)


def location_prefix(error: BaseException, *files: str) -> str:
    """Return `error_location` as the prefix of a message, "file:line: "; "" without a location."""
    location = error_location(error, *files)
    return f"{location[0]}:{location[1]}: " if location else ""


def env_of(plugin: Any, args: Mapping[str, Any]) -> Any:
    """Construct an env from a class or function with `args`, or return an env instance unchanged.

    Raises RloraError if there are `args` for an instance, and whatever the constructor raises.
    """
    if callable(plugin):
        return plugin(**args)
    if args:
        raise RloraError(f"env_args = {dict(args)!r}: the env is an instance; remove env_args, or pass the env's class")
    return plugin


def file_of(plugin: Any) -> str:
    """Return the file that defines a function, a class, or the class of an object; "" if there is none."""
    source = plugin if inspect.isclass(plugin) or inspect.isroutine(plugin) else type(plugin)
    if inspect.isclass(source):  # an unpickled class names a module of another process, but its functions have files
        functions = (member for member in vars(source).values() if inspect.isfunction(member))
        source = next((function for function in functions if function.__code__.co_filename != "<string>"), source)
    try:
        return inspect.getfile(source)
    except (OSError, TypeError):  # written in C
        return ""


def _load_registered(field: str, spec: str) -> Any:
    if spec not in _registered:
        raise RloraError(
            f"{field} = {spec!r}: it was passed from Python, and this process has no such object; pass the object "
            f"to rlora.train again, or move it to a file and set {field} to path/to/file.py:name"
        )
    plugin = _registered[spec]
    if not isinstance(plugin, Pickled):
        return plugin
    try:
        return cloudpickle.loads(plugin.data)
    except Exception as error:
        raise RloraError(
            f"{field} = {spec!r}: this process can't unpickle the object ({type(error).__name__}: {error}); install "
            f"the modules that the object imports on every node, or set {field} to path/to/file.py:name"
        ) from error


def _pickle(field: str, spec: str, plugin: Any) -> Pickled:
    if isinstance(plugin, Pickled):
        return plugin
    data = io.BytesIO()
    pickler = _Pickler(data)
    try:
        pickler.dump(plugin)
    except Exception as error:
        raise RloraError(
            f"{field} = {spec!r}: the object can't be sent to other processes, because pickling raised "
            f"{type(error).__name__}: {error}; create locks, files and clients in the first call, or move the object "
            f"to a file and set {field} to path/to/file.py:name"
        ) from error
    sources = {file: linecache.getlines(file) for file in sorted(pickler.files) if not os.path.exists(file)}
    return Pickled(data.getvalue(), {file: lines for file, lines in sources.items() if lines})


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Keeps the file names of code objects, which cloudpickle drops: tracebacks and `inspect` need them."""

    def __init__(self, file: io.BytesIO) -> None:
        self.files: set[str] = set()
        self.dispatch_table = ChainMap({CodeType: self._code}, cloudpickle.Pickler.dispatch_table)
        super().__init__(file)

    def _code(self, code: CodeType) -> tuple[Any, ...]:
        self.files.add(code.co_filename)
        make, arguments, *_ = cloudpickle.Pickler.dispatch_table[CodeType](code)
        return _code_with_file, (code.co_filename, make, arguments)


def _code_with_file(file: str, make: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    return make(*arguments).replace(co_filename=file)
