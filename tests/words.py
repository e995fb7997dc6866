"""Lists faults in names and words: `python tests/words.py`. test_words.py requires that there are none.

- variables and parameters that are named by a preposition, a pronoun or a bare participle;
- docs of config fields that depend on the field before them, and fields without one;
- `print` outside of `rlora/cli`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = frozenset(
    """
    about above after against among as at before behind below beside between beyond by down during for from in into near
    of off on onto over past per since through till to toward under until up upon with within without
    all another any both each either he her here him his how it its itself many mine neither nobody none nothing one
    ones other others ours same she some somebody something such that their theirs them there these they this those what
    whatever when where which who whom whose why
    asked given known said told
    """.split()
)
PUBLIC = {("rlora/sweeps/sweep.py", "over")}  # parameters of rlora.sweep
DEPENDENT = re.compile(r"(Of|So|And|But|As|Beside|The same|Its|How far|Whether it|What it|Also|Likewise|Then)\b")


def main() -> None:
    faults = [*variables(), *dependent_docs(), *prints()]
    print(*faults, sep="\n")
    sys.exit(bool(faults))


def variables() -> Iterator[str]:
    """Forbidden names of variables and parameters, except fields of classes and parameters of special methods."""
    for path, tree in sources("rlora", "rewards", "envs"):
        fields = {
            node.target for part in ast.walk(tree) if isinstance(part, ast.ClassDef)
            for node in part.body if isinstance(node, ast.AnnAssign)
        }  # fmt: skip
        for node in ast.walk(tree):
            names = [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                names = parameters(node)
            for name in names:
                if name in FORBIDDEN and node not in fields and (path, name) not in PUBLIC:
                    yield f"{path}:{node.lineno}: variable {name!r}"  # type: ignore[attr-defined]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[str]:
    if not isinstance(function, ast.Lambda) and re.fullmatch(r"__(?!init)\w+__", function.name):
        return []  # such as `other` of __eq__
    names = function.args
    optional = [argument for argument in (names.vararg, names.kwarg) if argument]
    return [argument.arg for argument in (*names.posonlyargs, *names.args, *names.kwonlyargs, *optional)]


def dependent_docs() -> Iterator[str]:
    """Config fields whose docs do not stand alone, or are missing. A section is documented by its fields."""
    for path, tree in sources("rlora/settings"):
        for part in ast.walk(tree):
            if not isinstance(part, ast.ClassDef) or not part.name.endswith("Config"):
                continue
            for node, successor in zip(part.body, [*part.body[1:], None], strict=True):
                if not isinstance(node, ast.AnnAssign) or re.search(r"default_factory=\w+Config", ast.unparse(node)):
                    continue
                is_text = isinstance(successor, ast.Expr) and isinstance(successor.value, ast.Constant)
                doc = str(successor.value.value) if is_text else ""  # type: ignore[union-attr]
                if not doc or DEPENDENT.match(doc):
                    yield f"{path}:{node.lineno}: doc of {ast.unparse(node.target)}: {doc!r}"


def prints() -> Iterator[str]:
    for path, tree in sources("rlora"):
        for node in ast.walk(tree):
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if is_print and not path.startswith("rlora/cli/"):
                yield f"{path}:{node.lineno}: print"  # type: ignore[attr-defined]


def sources(*rooms: str) -> Iterator[tuple[str, ast.Module]]:
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


if __name__ == "__main__":
    main()
