"""Attacks on the math reward: mutated pairs, and changes of a gold's value that must not be paid.

    python benchmarks/attack.py [--pairs 200000] [--paid paid.jsonl] [--seed 0]
    python benchmarks/attack.py --structural [--every 1]

The first grades random pairs from the labelled answers in `../shared/graders` and `tests/cases`, with mutations of
their text, in two processes. It writes the pairs that are paid although their texts differ to `--paid`, to be read by
hand. The second makes some fifty changes of each gold of MATH train (`--every` n-th) that change its value
(`tests/attacks.py`): sign, order, one member, a function around it, another left side, words behind it.

Each prints its exceptions, its timeouts and what is paid, and as its last line a JSON object: `pairs`, `exceptions`, `timeouts`,
`paid`, `seconds`.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from rlora.rewards.answer import find_gold
from rlora.rewards.equivalence import grade

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
_CHUNK = 1000
Pair = tuple[str, str]


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

    if options.structural:
        pairs = changed(golds(options.shared)[:: options.every])
    else:
        texts = answers([options.shared / "graders", ROOT / "tests" / "cases"])
        pairs = mutated_pairs(texts, options.pairs, options.seed)
    start = time.perf_counter()
    counts: Counter[str] = Counter()
    paid: list[Pair] = []
    with ProcessPoolExecutor(2) as pool:
        for graded in pool.map(graded_chunk, chunks(pairs)):
            for (gold, prediction), status in graded:
                counts[status.partition(":")[0]] += 1
                if status.startswith(("exception", "timeout")):
                    print(status, repr(gold), repr(prediction))
                elif status == "correct" and (options.structural or gold.strip() not in prediction):
                    paid.append((gold, prediction))
    for gold, prediction in paid[:20]:
        print("paid:", repr(gold[-80:]), "for", repr(prediction[-120:]))
    if options.paid:
        rows = (json.dumps({"gold": gold, "prediction": prediction}) for gold, prediction in paid)
        options.paid.write_text("\n".join(rows), "utf-8")
    figures = {"pairs": counts.total(), "exceptions": counts["exception"], "timeouts": counts["timeout"]}
    print(json.dumps(figures | {"paid": len(paid), "seconds": time.perf_counter() - start}))


def golds(shared: Path) -> list[str]:
    """The distinct golds of MATH train."""
    rows = json.loads((shared / "data" / "math_train" / "math.json").read_text("utf-8"))
    return sorted({find_gold(row["answer"]).text.strip("$ ") for row in rows if row["answer"]})


def changed(texts: Iterable[str]) -> Iterator[Pair]:
    from attacks import changes

    return ((gold, rf"\boxed{{{text}}}") for gold in texts for _, text in changes(gold))


def chunks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    rest = iter(pairs)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def graded_chunk(pairs: list[Pair]) -> list[tuple[Pair, str]]:
    return [(pair, status_of(*pair)) for pair in pairs]


def status_of(gold: str, prediction: str) -> str:
    try:
        return grade(gold, prediction)
    except Exception as error:
        return f"exception: {type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
