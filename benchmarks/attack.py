"""Attacks on the math reward: mutated pairs, and changes of a gold's value that must not be paid.

    python benchmarks/attack.py [--pairs 200000] [--paid paid.jsonl] [--seed 0]
    python benchmarks/attack.py --structural [--every 1] [--paid paid.jsonl]

The first form grades random pairs of answers whose texts are mutated (`tests/rewards/attacks.py`). The answers are the
labelled ones in `../shared/graders` and `tests/rewards/cases`, and the gold answers of MATH train. The second form
makes about a hundred changes of every n-th gold answer of MATH train (`--every`). Each changes the value: sign, order,
one member, multiplicity, an enclosing function, the left side, an end, a word (`tests/rewards/changes.py`). Both use
two processes.

Each prints the pairs that raise an exception, those that time out and, by kind of change, those that are paid (graded
as correct). `--paid` writes the paid pairs whose texts differ to a file, for manual review. The last line is a JSON
object: `pairs`, `exceptions`, `timeouts`, `paid`, `seconds`; for structural changes also `golds` and
`changes_per_gold` (the median).
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from rlora.rewards.equivalence import grade
from rlora.rewards.math.answer import find_gold

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "rewards"))
_CHUNK = 1000
_SHOWN = 5  # examples per kind
Attack = tuple[str, str, str]  # kind, gold answer, prediction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paid", type=Path)
    parser.add_argument("--structural", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    options = parser.parse_args()
    if not options.shared.is_dir():
        sys.exit(f"--shared {options.shared}: no such directory; name one with graders/ and data/math_train/")
    from attacks import answers, mutated_pairs

    figures: dict[str, Any] = {}
    attacks: Iterable[Attack]
    if options.structural:
        chosen = golds(options.shared)[:: options.every]
        attacks = changed(chosen)
        figures["golds"] = len(chosen)
    else:
        texts = [*answers([options.shared / "graders", ROOT / "tests" / "rewards" / "cases"]), *golds(options.shared)]
        attacks = (("mutation", *pair) for pair in mutated_pairs(texts, options.pairs, options.seed))
    figures |= run(attacks, options.paid)
    print(json.dumps(figures))


def run(attacks: Iterable[Attack], file: Path | None) -> dict[str, Any]:
    """Grade all attacks, print the failures, and return the counts."""
    start = time.perf_counter()
    counts: Counter[str] = Counter()
    per_gold: Counter[str] = Counter()
    found: defaultdict[str, list[Attack]] = defaultdict(list)
    with ProcessPoolExecutor(2) as pool:
        for graded in pool.map(graded_chunk, chunks(attacks)):
            for attack, status in graded:
                kind, gold, prediction = attack
                counts[status.partition(":")[0]] += 1
                per_gold[gold] += kind != "mutation"
                if status.startswith(("exception", "timeout")):
                    found[status].append(attack)
                elif status == "correct" and prediction not in (gold, rf"\boxed{{{gold}}}"):
                    found[f"paid, {kind}"].append(attack)
    show(found)
    paid = [attack for title, attacks in found.items() if title.startswith("paid") for attack in attacks]
    if file:
        rows = (json.dumps(dict(zip(("kind", "gold", "prediction"), attack, strict=True))) for attack in paid)
        file.write_text("".join(f"{row}\n" for row in rows), "utf-8")
    figures: dict[str, Any] = {
        "pairs": counts.total(),
        "exceptions": counts["exception"],
        "timeouts": counts["timeout"],
    }
    if any(per_gold.values()):
        figures["changes_per_gold"] = median(per_gold.values())
    return figures | {"paid": len(paid), "seconds": round(time.perf_counter() - start, 1)}


def show(found: dict[str, list[Attack]]) -> None:
    for title, attacks in sorted(found.items()):
        print(f"{title}: {len(attacks)}")
        for _, gold, prediction in attacks[:_SHOWN]:
            print("   ", repr(gold[-80:]), "for", repr(prediction[-120:]))


def golds(shared: Path) -> list[str]:
    """The distinct gold answers of MATH train."""
    rows = json.loads((shared / "data" / "math_train" / "math.json").read_text("utf-8"))
    return sorted({find_gold(row["answer"]).text.strip("$ ") for row in rows if row["answer"]})


def changed(texts: Iterable[str]) -> Iterator[Attack]:
    from changes import changes

    return ((kind, gold, rf"\boxed{{{text}}}") for gold in texts for kind, text in changes(gold))


def chunks(attacks: Iterable[Attack]) -> Iterator[list[Attack]]:
    rest = iter(attacks)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def graded_chunk(attacks: Sequence[Attack]) -> list[tuple[Attack, str]]:
    return [(attack, status_of(*attack[1:])) for attack in attacks]


def status_of(gold: str, prediction: str) -> str:
    try:
        return grade(gold, prediction)
    except Exception as error:
        return f"exception: {type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
