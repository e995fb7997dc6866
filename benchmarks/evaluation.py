"""The cost of evaluation during training: the time of the steps that it overlaps, compared with neighbouring steps.

    python benchmarks/evaluation.py [--steps 48] [--every 6]

Trains launch/arithmetic.toml with one engine and with two. The held-out prompts of version v are sampled during steps v
and v + 1. The two steps before and the two steps after these give the time of a step without evaluation, on the same
machine, in the same minute and with updates of similar size. Prints a table and, as its last line, a JSON object by
number of engines: `seconds` per evaluation with the standard error, and `ratios`, the training time with evaluation
divided by that without.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from main_job import train
from rich.console import Console
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--every", type=int, default=6)
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {}
    ratios: dict[int, float] = {}
    table = Table("engines", "evaluations", "seconds per step without", "seconds per evaluation", "ratio")
    with tempfile.TemporaryDirectory() as directory:
        for engines in (1, 2):
            arguments = ["--steps", str(options.steps), "--engine.replicas", str(engines), "--engine.kv-cache-gib", "1"]
            arguments += ["--evaluate.every", str(options.every)]
            _, lines = train("launch/arithmetic.toml", 0, Path(directory) / f"{engines}-engines", arguments)
            times = [line["time/step"] for line in lines]
            versions = [line["accuracy/version"] for line in lines if line.get("accuracy/version")]
            without = [fmean([*times[v - 2 : v], *times[v + 2 : v + 4]]) for v in versions]
            extra = [times[v] + times[v + 1] - 2 * step for v, step in zip(versions, without, strict=True)]
            seconds[engines] = [fmean(extra), stdev(extra) / len(extra) ** 0.5]
            ratios[engines] = 1 + fmean(extra) / (options.every * fmean(without))
            cells = f"{fmean(without):.2f}", "{:.2f} ± {:.2f}".format(*seconds[engines]), f"{ratios[engines]:.3f}"
            table.add_row(str(engines), str(len(versions)), *cells)
    Console().print(table)
    print(json.dumps({"seconds": seconds, "ratios": ratios}))


if __name__ == "__main__":
    main()
