"""Tests the claims of "LoRA Without Regret" (Thinking Machines, 2025) with sweeps: tables and confidence intervals.

    rlora sweep benchmarks/regret/sums.toml --over ... --run-dir runs/sums/ranks    docs/without-regret.md lists them
    python benchmarks/without_regret.py add sums runs/sums/*       adds their members to docs/without-regret.csv
    python benchmarks/without_regret.py tell                       prints tables and verdicts from that file

A claim is about the difference of two mean accuracies after training, each over seeds. Its 95% interval (Welch) decides
whether the claim held, did not hold, or cannot be decided at this size. "Matches" is a difference of at most 0.05. The
name of a sweep up to the first hyphen is its purpose: ranks, full, place, batch, seeds.
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
from rlora.sweeps.results import Standing, difference, read_results

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "without-regret.csv"
SAME = 0.05
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="add members of sweeps to docs/without-regret.csv")
    adding.add_argument("task")
    adding.add_argument("sweeps", nargs="+", type=Path)
    commands.add_parser("tell", help="print tables and verdicts from that file")
    options = parser.parse_args()
    if options.command == "add":
        add(options.task, options.sweeps)
    else:
        tell(rows())


def add(task: str, sweeps: Sequence[Path]) -> None:
    """Add the finished members of sweeps, in place of earlier rows of the same sweeps."""
    names = {directory.name for directory in sweeps}
    kept = [row for row in rows() if (row["task"], row["sweep"]) not in {(task, name) for name in names}]
    new = [
        row_of(task, directory, member)
        for directory in sweeps
        for member in read_results(directory)
        if member.status == "finished" and not member.origin  # a fork had other settings before
    ]
    if not new:
        raise SystemExit(f"no member of {', '.join(sorted(names))} has finished")
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]))
        writer.writeheader()
        writer.writerows([*kept, *new])
    print(f"{FILE.relative_to(ROOT)}: {len(new)} members more, {len(kept)} as they were")


def row_of(task: str, directory: Path, member: Any) -> Row:
    config = read(directory / member.name / "config.toml")
    return {
        "task": task,
        "sweep": directory.name,
        "rank": 0 if config.learner.full_finetuning else config.learner.rank,  # 0: full fine-tuning
        "targets": config.learner.targets,
        "lr": config.learner.lr,
        "prompts": config.prompts_per_step,
        "steps": config.steps,
        "seed": config.seed,
        "before": round(member.initial_accuracy, 4),
        "after": round(member.final_accuracy, 4),
        "reward": round(fmean(member.rewards), 4),  # mean over all steps: how fast it learned
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
        selected = [row for row in found if row["task"] == task]
        print(f"\n## {task}: {selected[0]['before']:.3f} before training\n")
        by_purpose: dict[str, list[Row]] = {}
        for row in selected:
            by_purpose.setdefault(row["sweep"].partition("-")[0], []).append(row)
        rates(by_purpose.get("ranks", []) + by_purpose.get("full", []))
        if "batch" in by_purpose:  # the small batches are those of the first two sweeps
            first = by_purpose.get("ranks", []) + by_purpose.get("full", [])
            by_purpose["batch"] += [row for row in first if row["rank"] in ranks(by_purpose["batch"])]
        for kind, report in {"seeds": matches, "place": places, "batch": batches}.items():
            if kind in by_purpose:
                print()
                report(by_purpose[kind])


def rates(found: Sequence[Row]) -> None:
    """Print accuracy by learning rate for each rank, and the best rate of each rank."""
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
    """Compare rank 1 with rank 8 and full fine-tuning, each at its best rate, on new seeds."""
    for rank in ranks(found):
        print(f"- {name_of(rank)}: {Standing('', values(found, rank=rank))}")
    for rank in sorted({row["rank"] for row in found} - {1}, reverse=True):
        same(f"rank 1 matches {name_of(rank)}", values(found, rank=1), values(found, rank=rank))


def places(found: Sequence[Row]) -> None:
    """Compare attention, MLP and all layers with similar numbers of parameters, each at its best rate."""
    best = {}
    for targets in dict.fromkeys(row["targets"] for row in found):
        rate, best[targets] = best_rate(found, targets=targets)
        rank = next(row["rank"] for row in found if row["targets"] == targets)
        print(f"- {targets}, rank {rank}, rate {rate:g}: {Standing('', best[targets])}")
    more("all layers beat attention", best["all"], best["attention"])
    more("MLP alone beats attention alone", best["mlp"], best["attention"])


def batches(found: Sequence[Row]) -> None:
    """Compare two batch sizes with equal episodes: the cost of the large one, for each rank."""
    costs = {}
    small, large = sorted({row["prompts"] for row in found})
    for rank in ranks(found):
        best = {prompts: best_rate(found, rank=rank, prompts=prompts)[1] for prompts in (small, large)}
        print(
            f"- {name_of(rank)}: {Standing('', best[small])} at {small} prompts, {Standing('', best[large])} at {large}"
        )
        costs[rank] = [small_mean - large_mean for small_mean, large_mean in zip(best[small], best[large], strict=True)]
    if {0, 1} <= costs.keys():
        more("large batches cost rank 1 more than full fine-tuning", costs[1], costs[0])


def ranks(found: Sequence[Row]) -> list[int]:
    """All ranks in ascending order; full fine-tuning, 0, comes last."""
    return sorted({row["rank"] for row in found}, key=lambda rank: rank or math.inf)


def best_rate(found: Sequence[Row], **fields: Any) -> tuple[float, list[float]]:
    """The learning rate with the highest mean accuracy among the selected rows, and its accuracies."""
    by_rate = {rate: values(found, lr=rate, **fields) for rate in sorted({row["lr"] for row in found})}
    return max(
        ((rate, accuracies) for rate, accuracies in by_rate.items() if accuracies), key=lambda pair: fmean(pair[1])
    )


def values(found: Sequence[Row], **fields: Any) -> list[float]:
    return [row["after"] for row in found if all(row[name] == value for name, value in fields.items())]


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
