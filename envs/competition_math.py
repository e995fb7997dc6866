"""MATH (Hendrycks et al. 2021, arXiv:2103.03874): competition problems. Holds out MATH-500 (arXiv:2305.20050)."""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rlora.records import Prompt, RloraError

from .files import Row
from .generated import listed
from .rows import is_null, read_rows
from .table import cell, fill

TEMPLATE = "{problem}\nReason step by step, and put the answer into \\boxed{{}}."
SUBJECTS = (
    "Algebra", "Counting & Probability", "Geometry", "Intermediate Algebra", "Number Theory", "Prealgebra",
    "Precalculus",
)  # fmt: skip
_HUB = "EleutherAI/hendrycks_math"  # a subset for each subject, as counting_and_probability


class CompetitionMath:
    """Competition problems with LaTeX answers.

    `path` has the training problems and `held_out_path` the held-out problems. Each is a hub id, a local file (json,
    jsonl, csv, parquet), or a local directory: with math.json, or a copy of a hub data set. Rows have `problem`, and
    either `answer` or a `solution` whose last box is the answer; rows without an answer are skipped. `template` is the
    prompt's text, with the placeholder {problem}; other braces are doubled. `levels` ("4,5"; 5 is the hardest) and
    `subjects` (names from `SUBJECTS`) select training and held-out problems; by default all. Columns for rewards:
    `problem`, `level`, an integer or None, and `subject`, "" if a row has none.
    """

    def __init__(
        self,
        path: str = _HUB,
        held_out_path: str = "HuggingFaceH4/MATH-500",
        template: str = TEMPLATE,
        levels: str | int | Sequence[int] = "",
        subjects: str | Sequence[str] = "",
    ) -> None:
        if "{problem}" not in template:
            raise RloraError(f"env_args.template = {template!r}: it needs the placeholder {{problem}}")
        self._path, self._held_out_path = path, held_out_path
        self._template = template
        self._levels = {int(level) for level in _check_choices("levels", levels, "12345")}
        self._subjects = set(_check_choices("subjects", subjects, SUBJECTS))

    def train(self) -> Sequence[Prompt]:
        return self._part("env_args.path", self._path, "train")

    def held_out(self) -> Sequence[Prompt]:
        return self._part("env_args.held_out_path", self._held_out_path, "test")

    def _part(self, field: str, path: str, split: str) -> list[Prompt]:
        prompts = []
        for index, row in enumerate(_rows(field, path, split)):
            answer, level, subject = _gold(row), _level(row), str(row.get("subject") or row.get("type") or "")
            if answer is None or (self._levels and level not in self._levels):
                continue
            if self._subjects and subject not in self._subjects:
                continue
            source = f"{path}, {split}, row {index}"
            columns = {"problem": cell(row, "problem", source), "level": level, "subject": subject}
            prompts.append(Prompt(fill(self._template, row, source), answer=answer, columns=columns))
        if not prompts:
            raise RloraError(
                f"{field} = {path!r}: no problem is left; use data whose rows have answer or solution, or select "
                "more problems by env_args.levels and env_args.subjects"
            )
        return prompts


def _check_choices(name: str, argument: object, choices: Collection[str]) -> list[str]:
    """Return the values of the argument `name`. Raises RloraError if a value is not in `choices`."""
    for value in listed(argument):
        if value not in choices:
            raise RloraError(f"env_args.{name} = {argument!r}: {value!r} is not one of {', '.join(choices)}")
    return listed(argument)


def _rows(field: str, path: str, split: str) -> Iterator[Row]:
    subsets = [subject.lower().replace(" ", "_").replace("&", "and") for subject in SUBJECTS]
    if path == _HUB or all((Path(path) / subset).is_dir() for subset in subsets):
        for subset in subsets:
            yield from read_rows(field, path, subset, split)
    else:
        file = Path(path) / "math.json"
        yield from read_rows(field, str(file) if file.is_file() else path, None, split)


def _level(row: Row) -> int | None:
    """Return the level, from `level` (5 or "Level 5") or `difficulty` (5.0); None if a row has neither."""
    digits = re.search(r"\d", str(row.get("level") or row.get("difficulty") or ""))
    return int(digits[0]) if digits else None


def _gold(row: Row) -> str | None:
    answer = row.get("answer")
    return last_boxed(str(row.get("solution") or "")) if is_null(answer) else str(answer)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} or \fbox{...} of a reference solution; None if there is none."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end]
    return None
