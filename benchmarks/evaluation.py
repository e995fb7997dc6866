"""What evaluation beside training costs: the time of a step with and without it, on one engine and on two.

    python benchmarks/evaluation.py [--steps 24] [--every 8]

Trains launch/arithmetic.toml four times, one after the other. Prints a table and, as its last line, a JSON object:
`seconds`, the mean time of a step without the first one, by engines and with or without, and `ratios`, with over
without, by engines.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

from main_job import train
from rich.console import Console
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=8)
    options = parser.parse_args()
    seconds: dict[str, float] = {}
    table = Table("engines", "evaluate.every", "seconds a step", "evaluated versions", "all of training")
    with tempfile.TemporaryDirectory() as directory:
        for engines in (1, 2):
            for every in (0, options.every):
                name = f"{engines} engines, every {every}"
                given = ["--steps", str(options.steps), "--engine.replicas", str(engines), "--engine.kv-cache-gib", "1"]
                given += ["--evaluate.every", str(every), "--evaluate.prompts", "42"]
                summary, lines = train("launch/arithmetic.toml", 0, Path(directory) / name, given)
                seconds[name] = fmean(line["time/step"] for line in lines[1:])
                versions = [str(line["accuracy/version"]) for line in lines if "accuracy/version" in line]
                cells = f"{seconds[name]:.2f}", " ".join(versions) or "none", f"{summary['time/train']:.0f} s"
                table.add_row(str(engines), str(every), *cells)
    Console().print(table)
    ratios = {
        engines: seconds[f"{engines} engines, every {options.every}"] / seconds[f"{engines} engines, every 0"]
        for engines in (1, 2)
    }
    print(json.dumps({"seconds": seconds, "ratios": ratios}))


if __name__ == "__main__":
    main()
