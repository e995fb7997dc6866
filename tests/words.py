"""Lists what design and docs ask of names and words: `python tests/words.py`; test_words.py holds it to be empty.

- variables and parameters that are named by a preposition or a pronoun, or by a bare participle;
- docs of config fields that lean on the field before them;
- `print` outside of `rlora/cli`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREPOSITIONS = (
    "about above after against among as at before behind below beside between beyond by down during for from "
)
PREPOSITIONS += (
    "in into near of off on onto over past per since through till to toward under until up upon with within "
)
PREPOSITIONS += "without"
PRONOUNS = "all another any both each either he her here him his how it its itself many mine neither nobody none "
PRONOUNS += "nothing one ones other others ours same she some somebody something such that their theirs them there "
PRONOUNS += "these they this those what whatever when where which who whom whose why"
PARTICIPLES = "asked given known said told"
FORBIDDEN = frozenset(f"{PREPOSITIONS} {PRONOUNS} {PARTICIPLES}".split())
LEANING = re.compile(r"^(Of|So|And|But|Where|As|Beside|The same|Its|How far|Whether it|What it|Also|Likewise|Then)\b")


def main() -> None:
    found = [*variables(), *leaning_docs(), *prints()]
    print(*found, sep="\n")
    sys.exit(bool(found))


def variables() -> Iterator[str]:
    """Names that are stored, and parameters but those that Python's own protocols name (`other` of `__eq__`)."""
    for path in sorted(path for room in ("rlora", "rewards", "envs") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                special = isinstance(node, ast.FunctionDef) and node.name.startswith("__") and node.name != "__init__"
                names = [] if special else _parameters(node.args)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names = [node.id]
            else:
                continue
            yield from (f"{_place(path, node)}: variable {name!r}" for name in names if name in FORBIDDEN)


def _parameters(arguments: ast.arguments) -> list[str]:
    extra = [each for each in (arguments.vararg, arguments.kwarg) if each]
    return [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *extra)]


def leaning_docs() -> Iterator[str]:
    """Docs of config fields that begin as if the reader had read the one before, or that are missing."""
    for path in sorted((ROOT / "rlora" / "settings").glob("*.py")):
        for settings in ast.walk(ast.parse(path.read_text())):
            if not isinstance(settings, ast.ClassDef) or not settings.name.endswith("Config"):
                continue
            for field, after in zip(settings.body, [*settings.body[1:], None], strict=True):
                if not isinstance(field, ast.AnnAssign) or (
                    "default_factory=" in ast.unparse(field) and "Config" in ast.unparse(field)
                ):
                    continue  # a section is documented by its fields
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                if not text or LEANING.match(str(text)):
                    yield f"{_place(path, field)}: doc of {ast.unparse(field.target)}: {text!r}"


def prints() -> Iterator[str]:
    for path in sorted((ROOT / "rlora").rglob("*.py")):
        if "cli" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{_place(path, node)}: print"


def _place(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


if __name__ == "__main__":
    main()
