"""Tools for agents: a calculator, Python, search, and an env that adds tools to another env."""

import ast
import operator
import re
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

from rlora.plugin import load
from rlora.records import Prompt, RloraError

from .generated import counts, listed
from .python_tool import check_limits, with_instruction
from .rows import read_rows
from .sandbox import run
from .table import cell

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def called(name: str, result: str, **arguments: Any) -> list[dict[str, Any]]:
    """Return the messages of a call and its result, for an example in a prompt."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": result},
    ]


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers with + - * / and parentheses, such as (2+3)*4.
    """
    return calculate(str(expression))  # models write numbers without quotes


def calculate(text: str) -> str:
    """Compute an expression of + - * / and parentheses. Returns an integer, a decimal with 6 digits, or "error".

    `text` is parsed, never passed to `eval`. It must be short, so that its numbers and their product are small.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
        return str(value) if value.denominator == 1 else f"{float(value):.6g}"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.expr) -> Fraction:
    """Compute a parsed expression. Raises ValueError for any other expression, and ZeroDivisionError."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        result: Fraction = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
        return result
    raise ValueError("not an expression")


class Search:
    """Full-text search in a small corpus, ranked by BM25 (SQLite's FTS5).

    `documents` are kept in memory; they are read at the first search. `results` is the number of documents that a
    search returns.
    """

    def __init__(self, documents: Callable[[], Iterable[str]], results: int = 3) -> None:
        self._documents, self._results = documents, results

    @cached_property
    def _index(self) -> sqlite3.Connection:
        index = sqlite3.connect(":memory:")
        index.execute("CREATE VIRTUAL TABLE corpus USING fts5(text, tokenize = 'porter unicode61')")
        index.executemany("INSERT INTO corpus VALUES (?)", ((text,) for text in self._documents()))
        return index

    def search(self, query: str) -> str:
        """Search the documents, and return those that fit best.

        Args:
            query: Words to search for.
        """
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query)) or '""'
        found = self._index.execute(
            "SELECT text FROM corpus WHERE corpus MATCH ? ORDER BY rank, rowid LIMIT ?", (words, self._results)
        )
        return "\n".join(text for (text,) in found) or "nothing found"


class WithTools:
    """An agent that adds tools to an env with a single turn.

    `env` is the spec of the env, which gets all arguments that are not named here. `tools` is a selection of
    calculator, python, search, and specs of functions (mine.py:multiply). `instruction` is appended to each problem. An
    episode ends with the first message without a call, or with the message that would exceed `max_calls` calls, none of
    which is made. `python` runs code in a sandbox (`rlora.envs.sandbox`), which `allow_python` must allow, with the
    limits of `PythonTool`. `search` finds `results` documents of `corpus`, a file or a data set whose column `text` has
    the documents. Reward: the env's reward.
    """

    def __init__(
        self,
        env: str,
        tools: str | Sequence[str] = "calculator",
        instruction: str = "",
        max_calls: int = 5,
        allow_python: bool = False,
        seconds: float = 5.0,
        memory_mib: int = 512,
        characters: int = 1000,
        corpus: str = "",
        results: int = 3,
        **env_args: Any,
    ) -> None:
        self.max_calls = counts("max_calls", max_calls, 1, 1000)[0]
        self._env, self._env_args, self._instruction = env, env_args, instruction
        self._limits = (seconds, memory_mib, characters)
        names = listed(tools)
        if "python" in names:
            check_limits(allow_python, *self._limits)
        if "search" in names and not corpus:
            raise RloraError("env_args.corpus is not set: name the file or data set that the tool search reads")
        search = self._search = Search(lambda: _texts(corpus), counts("results", results, 1, 100)[0])
        ready = {"calculator": calculator, "python": self.python, "search": search.search}
        self.tools = [ready[name] if name in ready else load("env_args.tools", name) for name in names]

    def python(self, code: str) -> str:
        """Run Python code, and return what it prints.

        Args:
            code: Python code that prints its result.
        """
        return run(code, *self._limits).strip()

    def train(self) -> Iterable[Prompt]:
        if self.python in self.tools:
            run("", seconds=60.0)  # raises RloraError before sampling if the sandbox does not work
        if self._search.search in self.tools:
            self._search.search("")  # raises RloraError if the corpus can't be read
        return with_instruction(self._inner().train(), self._instruction)

    def held_out(self) -> Iterable[Prompt]:
        return with_instruction(self._inner().held_out(), self._instruction)

    def _inner(self) -> Any:
        env = load("env_args.env", self._env)(**self._env_args)
        if hasattr(env, "reply") or hasattr(env, "tools"):
            raise RloraError(f"env_args.env = {self._env!r}: it is an agent itself; use an env with a single turn")
        return env


def _texts(corpus: str) -> list[str]:
    rows = read_rows("env_args.corpus", corpus, None, "train")
    return [str(cell(row, "text", f"env_args.corpus = {corpus!r}, row {number}")) for number, row in enumerate(rows)]
