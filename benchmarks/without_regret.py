"""What sweeps say of the claims of "LoRA Without Regret" (Thinking Machines, 2025): tables, and how sure each is.

    rlora sweep benchmarks/regret/sums.toml --over ... --run-dir runs/sums/ranks
    python benchmarks/without_regret.py add sums runs/sums/*       their members into docs/without-regret.csv
    python benchmarks/without_regret.py tell                       tables and verdicts from that file

A claim is about a difference of two means of accuracy after training, each over seeds. Its 95% interval (Welch) decides
whether it held, did not, or can't be told at this size. "The same" is a difference of at most 0.05. A sweep's name
says what it is for up to the first hyphen: ranks, full, place, batch, seeds.
"""

import argparse
import csv
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from rlora.config import read
from rlora.sweeps.results import Standing, difference, ended

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "without-regret.csv"
SAME = 0.05
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="members of sweeps into docs/without-regret.csv")
    adding.add_argument("task")
    adding.add_argument("sweeps", nargs="+", type=Path)
    commands.add_parser("tell", help="tables and verdicts from it")
    options = parser.parse_args()
    if options.command == "add":
        add(options.task, options.sweeps)
    else:
        tell(rows())


def add(task: str, sweeps: Sequence[Path]) -> None:
    """Write the members of sweeps that have finished; what the file has of the same sweeps goes."""
    names = {place.name for place in sweeps}
    kept = [row for row in rows() if (row["task"], row["sweep"]) not in {(task, name) for name in names}]
    new = [row_of(task, place, each) for place in sweeps for each in ended(place) if each.status == "finished"]
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]))
        writer.writeheader()
        writer.writerows([*kept, *new])
    print(f"{FILE.relative_to(ROOT)}: {len(new)} members more, {len(kept)} as they were")


def row_of(task: str, place: Path, member: Any) -> Row:
    config = read(place / member.name / "config.toml")
    return {
        "task": task,
        "sweep": place.name,
        "rank": 0 if config.learner.whole else config.learner.rank,  # 0: full fine-tuning
        "targets": config.learner.targets,
        "lr": config.learner.lr,
        "prompts": config.prompts_per_step,
        "steps": config.steps,
        "seed": config.seed,
        "before": round(member.before, 4),
        "after": round(member.after, 4),
        "reward": round(fmean(member.rewards), 4),  # over all steps: how fast it learned
        "last": round(member.reward, 4),
    }


def rows() -> list[Row]:
    if not FILE.exists():
        return []
    with FILE.open(newline="") as file:
        return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def tell(found: Sequence[Row]) -> None:
    for task in dict.fromkeys(row["task"] for row in found):
        own = [row for row in found if row["task"] == task]
        print(f"\n## {task}: {own[0]['before']:.3f} before training\n")
        by: dict[str, list[Row]] = {}
        for row in own:
            by.setdefault(row["sweep"].partition("-")[0], []).append(row)
        rates(by.get("ranks", []) + by.get("full", []))
        for kind, report in {"seeds": matches, "place": places, "batch": batches}.items():
            if kind in by:
                print()
                report(by[kind])


def rates(found: Sequence[Row]) -> None:
    """Accuracy by learning rate, for each rank; and each rank's best rate."""
    all_rates = sorted({row["lr"] for row in found})
    print("| rank |", " | ".join(f"{rate:g}" for rate in all_rates), "| best rate |")
    print("|---|" + "---|" * (len(all_rates) + 1))
    best: dict[int, float] = {}
    for rank in ranks(found):
        best[rank], _ = best_rate(found, rank=rank)
        cells = [" ".join(f"{value:.2f}" for value in values(found, rank=rank, lr=rate)) for rate in all_rates]
        print(f"| {name_of(rank)} |", " | ".join(cells), f"| {best[rank]:g} |")
    if 0 in best and len(best) > 1:
        ratios = ", ".join(f"{best[rank] / best[0]:.0f} at rank {rank}" for rank in best if rank)
        print(f"\nBest rate of an adapter over that of full fine-tuning: {ratios}.")


def matches(found: Sequence[Row]) -> None:
    """Rank 1 beside rank 8 and full fine-tuning, each at its best rate, on fresh seeds."""
    for rank in ranks(found):
        print(f"- {name_of(rank)}: {Standing('', values(found, rank=rank))}")
    for rank in sorted({row["rank"] for row in found} - {1}, reverse=True):
        same(f"rank 1 matches {name_of(rank)}", values(found, rank=1), values(found, rank=rank))


def places(found: Sequence[Row]) -> None:
    """Attention, MLP and all layers at about as many parameters, each at the better of its rates."""
    best = {}
    for targets in dict.fromkeys(row["targets"] for row in found):
        rate, best[targets] = best_rate(found, targets=targets)
        rank = next(row["rank"] for row in found if row["targets"] == targets)
        print(f"- {targets}, rank {rank}, rate {rate:g}: {Standing('', best[targets])}")
    more("all layers beat attention", best["all"], best["attention"])
    more("MLP alone beats attention alone", best["mlp"], best["attention"])


def batches(found: Sequence[Row]) -> None:
    """Two batch sizes at equal episodes: what the large one costs, for rank 1 and for full fine-tuning."""
    costs = {}
    small, large = sorted({row["prompts"] for row in found})
    for rank in ranks(found):
        best = {prompts: best_rate(found, rank=rank, prompts=prompts)[1] for prompts in (small, large)}
        print(
            f"- {name_of(rank)}: {Standing('', best[small])} at {small} prompts, {Standing('', best[large])} at {large}"
        )
        costs[rank] = [mean - other for mean, other in zip(best[small], best[large], strict=True)]
    more("large batches cost rank 1 more than full fine-tuning", costs[1], costs[0])


def ranks(found: Sequence[Row]) -> list[int]:
    """Those that there are; full fine-tuning, 0, comes last."""
    return sorted({row["rank"] for row in found}, key=lambda rank: rank or math.inf)


def best_rate(found: Sequence[Row], **of: Any) -> tuple[float, list[float]]:
    """The learning rate with the highest mean among such rows, and the accuracies with it."""
    by_rate = {rate: values(found, lr=rate, **of) for rate in sorted({row["lr"] for row in found})}
    return max(((rate, own) for rate, own in by_rate.items() if own), key=lambda pair: fmean(pair[1]))


def values(found: Sequence[Row], **of: Any) -> list[float]:
    return [row["after"] for row in found if all(row[name] == value for name, value in of.items())]


def same(claim: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    mean, half = difference(Standing("", ours), Standing("", theirs))
    tell_claim(claim, mean, half, held=abs(mean) + half <= SAME, failed=mean + half < -SAME)


def more(claim: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    mean, half = difference(Standing("", ours), Standing("", theirs))
    tell_claim(claim, mean, half, held=mean - half > 0, failed=mean + half < 0)


def tell_claim(claim: str, mean: float, half: float, held: bool, failed: bool) -> None:
    word = "held" if held else "did not hold" if failed else "cannot be told"
    print(f"- {claim}: {word} (difference {mean:+.3f}, 95% {mean - half:+.3f} to {mean + half:+.3f})")


def name_of(rank: int) -> str:
    return f"rank {rank}" if rank else "full"


if __name__ == "__main__":
    main()
