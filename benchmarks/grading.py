"""The math reward compared with math-verify: errors on labelled pairs, and time per pair.

    python benchmarks/grading.py [--graders ../shared/graders] [--pairs 10000] [--soak 50000]

Prints a table and, as its last line, a JSON object:

- `ours`, `math_verify`: errors on the rows without a flag. math-verify is called as `verify(parse(gold),
  parse(prediction))`, with the gold answer in dollar signs if it has none.
- `new_ours`, `new_math_verify`: errors on rows of the kinds that users reported (`../shared/reports` and
  `tests/rewards/cases/reported.jsonl`).
- `microseconds_fast`: time per pair on the fast path, for completions of a few hundred characters.
- `pairs_per_minute`: for `--pairs` rows, including hostile ones, through two worker processes as in `rlora grade`;
  `math_verify_pairs_per_minute` in one process.
- `soak`: for `--soak` pairs, the number of remaining processes, and the MiB by which this process and its workers grew
  after the first tenth.
"""

import argparse
import itertools
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from rlora.records import RewardInput
from rlora.rewards.equivalence import grade
from rlora.scoring.pool import Pool
from rlora.scoring.worker import Setup

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "rewards"))
UNIT_EXEMPT = {"gsm8k_model_outputs", "qwen_math_outputs", "math500_derived"}
Pair = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--graders", type=Path, default=ROOT.parent / "shared" / "graders")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--soak", type=int, default=0)
    options = parser.parse_args()
    if not options.graders.is_dir():
        sys.exit(
            f"--graders {options.graders}: no such directory; name one of JSON lines with gold, prediction, expected"
        )
    logging.disable(logging.CRITICAL)  # math-verify logs each pair that it cannot read
    rows = read(options.graders)
    figures: dict[str, Any] = errors(rows)
    reported = [
        options.graders.parent / "reports" / "rewards.jsonl",
        ROOT / "tests" / "rewards" / "cases" / "reported.jsonl",
    ]
    new = errors([row for file in reported if file.is_file() for row in rows_of(file)])
    figures |= {f"new_{name}": new[name] for name in ("ours", "math_verify", "ratio")}
    figures["microseconds_fast"] = fast([row for row in rows if row["file"] == "gsm8k_model_outputs"])
    from hostile import hostile

    pairs = [(row["gold"], row["prediction"]) for row in rows] + [pair for pair in hostile() if len(pair[1]) < 10_000]
    figures["pairs_per_minute"] = pooled(itertools.islice(itertools.cycle(pairs), options.pairs))
    if options.soak:
        figures["soak"] = soak(pairs, options.soak)
    print(json.dumps(figures))


def rows_of(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text("utf-8").split("\n")
    return [{"file": file.stem, **json.loads(line)} for line in lines if line]


def read(directory: Path) -> list[dict[str, Any]]:
    rows = [row for file in sorted(directory.glob("*.jsonl")) for row in rows_of(file)]
    return [row for row in rows if not row["mode"].startswith("format") and not row.get("flag")]


def errors(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from math_verify import parse, verify

    def theirs(gold: str, prediction: str) -> bool:
        marked = gold if "$" in gold or "boxed" in gold else f"${gold}$"
        return bool(verify(parse(marked), parse(prediction)))

    counts: dict[str, Counter[str]] = {"rows": Counter(row["file"] for row in rows)}
    figures: dict[str, Any] = {}
    for name, right in (
        ("ours", lambda gold, prediction: grade(gold, prediction) == "correct"),
        ("math_verify", theirs),
    ):
        start = time.perf_counter()
        wrong = [row["file"] for row in rows if right(row["gold"], row["prediction"]) != row["expected"]]
        figures[f"{name}_pairs_per_minute"] = len(rows) / (time.perf_counter() - start) * 60
        counts[name] = Counter(wrong)
        figures |= {name: len(wrong), f"{name}_units": sum(file not in UNIT_EXEMPT for file in wrong)}
    table = Table("file", "rows", "ours", "math-verify")
    for file, count in sorted(counts["rows"].items()):
        table.add_row(file, str(count), str(counts["ours"][file]), str(counts["math_verify"][file]))
    Console().print(table)
    return figures | {"ratio": figures["ours"] / max(1, figures["math_verify"])}


def fast(rows: Sequence[dict[str, Any]]) -> float:
    """Microseconds per pair, median of five rounds."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for row in rows:
            grade(row["gold"], row["prediction"])
        rounds.append((time.perf_counter() - start) / len(rows) * 1e6)
    return median(rounds)


def pooled(pairs: Iterator[Pair]) -> float:
    with closing(Pool(Setup(("rlora.rewards.equivalence:math_answer",)), 2)) as pool:
        start = time.perf_counter()
        futures = [pool.submit(case(*pair)) for pair in pairs]
        for future in futures:
            future.result()
        return len(futures) / (time.perf_counter() - start) * 60


def soak(pairs: Sequence[Pair], count: int) -> dict[str, float]:
    """Grade `count` pairs with two workers. Returns the remaining processes and the memory growth."""
    me = psutil.Process()
    initial = len(me.children(recursive=True))
    with closing(Pool(Setup(("rlora.rewards.equivalence:math_answer",)), 2)) as pool:
        sizes = []
        for part in range(10):
            chosen = itertools.islice(itertools.cycle(pairs), part * count // 10, (part + 1) * count // 10)
            for future in [pool.submit(case(*pair)) for pair in chosen]:
                future.result()
            sizes.append(sum(process.memory_info().rss for process in (me, *me.children(recursive=True))) / 2**20)
    remaining = len(me.children(recursive=True)) - initial
    return {"pairs": count, "processes_left": remaining, "mib_grown": sizes[-1] - sizes[0], "mib": sizes[-1]}


def case(gold: str, prediction: str) -> RewardInput:
    messages = ({"role": "assistant", "content": prediction},)
    return RewardInput("", "", gold, {}, (prediction,), (messages,), ((),), ({},))


if __name__ == "__main__":
    main()
