"""Loads what a user plugs in, `module:name` or `path/to/file.py:name`, and finds its lines in a traceback."""

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from rlora.records import RloraError


def load(field: str, spec: str) -> Any:
    """The object that a field names as `module:name` or `path/to/file.py:name`. Raises RloraError where it can't.

    A module may lie in the working directory; a file may import what lies beside it.
    """
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
