"""Size of a report, the time to write and to open it, and the cost of weight telemetry.

    python benchmarks/report.py                  # a made-up run of 500 steps with 128 completions each
    python benchmarks/report.py --run runs/sums  # a run, and the share of its steps that measuring the update takes

Opening is the time from the start of the navigation until charts in view and completions are drawn, in Chromium.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

from upath import UPath

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
MATRICES = [
    f"model.layers.{layer}.{name}_proj"
    for layer in range(30)
    for name in ("mlp.down", "mlp.gate", "mlp.up", "self_attn.k", "self_attn.o", "self_attn.q", "self_attn.v")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=UPath, help="the directory of a run; by default a run is made up")
    parser.add_argument("--steps", type=int, default=500, help="steps of the made-up run")
    parser.add_argument("--quick", action="store_true", help="a made-up run of 20 steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = options.run or made_up(Path(directory) / "run", 20 if options.quick else options.steps)
        figures = page_figures(run, Path(directory) / "report.html")
        if options.run:
            figures |= telemetry_figures(run)
    print(json.dumps(figures, indent=1))


def made_up(path: Path, steps: int) -> UPath:
    """Write a run of 16 prompts x 8 completions of 16 tokens per step, over 210 matrices."""
    from report_run import write_run

    return write_run(path, steps, matrices=MATRICES, model="demo:smollm2-135m", prompts=16, size=8, tokens=16)


def page_figures(run: UPath, out: Path) -> dict[str, Any]:
    from rlora.report.report import write_report

    start = time.perf_counter()
    write_report([run], out, 2**22)
    figures = {"write_seconds": time.perf_counter() - start, "mib": out.stat().st_size / 2**20}
    return figures | ({"open_seconds": open_seconds(out)} if shutil.which("chromium") else {})


def open_seconds(page: Path) -> float:
    """Return the median of three openings in new tabs."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        seconds = []
        for _ in range(3):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            start = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready=yes]", timeout=120_000)
            tab.wait_for_selector(".plot svg.main-svg")
            seconds.append(time.perf_counter() - start)
            tab.close()
        browser.close()
    return median(seconds)


def telemetry_figures(run: UPath) -> dict[str, float]:
    """Measure the updates between the run's bundles again."""
    from rlora.run import checkpoint, directory
    from rlora.telemetry.weights import Weights, weights_line

    adapters = [checkpoint.read_version(run, version).adapter for version in checkpoint.versions(run)]
    weights, seconds = Weights({}, adapters[:1]), []
    for adapter in adapters[1:]:
        start = time.perf_counter()
        weights_line(adapter.number, weights.measure(adapter)[1])
        seconds.append(time.perf_counter() - start)
    step = fmean(line["time/step"] for line in directory.figures(run))
    return {"telemetry_seconds": median(seconds), "step_seconds": step, "telemetry_share": median(seconds) / step}


if __name__ == "__main__":
    main()
