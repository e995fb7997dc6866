"""`rlora train`: trains a run, and prints the table at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlora.cli.overrides import parse_train
from rlora.run.directory import check_free
from rlora.run.source import reachable

if TYPE_CHECKING:
    from rlora.train import Result

_CLASS = "AutoModelForCausalLM.from_pretrained"


def train_command(arguments: list[str]) -> None:
    """Train a run, new, resumed or forked, until its last step, and print its result."""
    options = parse_train(arguments)
    if options.run_dir and not options.resume:
        check_free(reachable(options.run_dir), options.overwrite)  # before imports and Ray's start, which take seconds
    from rlora.train import train

    source: Mapping[str, Any] = options.changes if options.resume or options.fork else {"config": options.config}
    result = train(
        run_dir=options.run_dir, resume=options.resume, fork=options.fork, overwrite=options.overwrite, **source
    )
    _report(result)


def _report(result: Result) -> None:
    """Print the table at the end of a run, and what to do next."""
    from rich.console import Console
    from rich.table import Column, Table

    from rlora.rollout.evaluate import Interval

    run, adapter, summary, figures = result.directory, result.adapter, result.summary, result.steps
    table = Table("", Column("", overflow="fold"), title="Result", show_header=False)
    for moment in ("before", "after"):
        if (accuracy := summary.get(f"accuracy/{moment}")) is not None:
            ends = [summary.get(f"accuracy/{moment}/{end}", math.nan) for end in ("low", "high")]
            interval = Interval(accuracy, *ends)
            table.add_row(f"accuracy {moment} training", f"{interval}, {summary['accuracy/prompts']} held-out prompts")
        for name in ("accuracy", "nll"):
            if (figure := summary.get(f"held_out/{name}/{moment}")) is not None:
                table.add_row(f"{name} {moment} training", f"{figure:.4f} on held-out examples")
    seconds = sum(line["time/step"] for line in figures)
    table.add_row("training", f"{len(figures)} steps in {seconds:.0f} s")
    table.add_row("total", f"{summary['time/total']:.0f} s, with start and evaluations")
    kind, name = ("all weights", "model") if adapter.full_weights else ("adapter", "adapter")
    table.add_row(kind, f"{summary['adapter/parameters']:,} parameters, {summary['adapter/bytes']:,} bytes")
    Console().print(table)
    path = summary["adapter/path"]
    print(f"The {name} is in {path}. Evaluate it again, or train to N steps in total:")
    print(f"  rlora eval {run}\n  rlora train --resume {run} --steps=N")
    if adapter.full_weights:
        print(f"Load it:\n  from transformers import AutoModelForCausalLM\n  policy = {_CLASS}({path!r})")
        return
    base = json.loads(adapter.config)["base_model_name_or_path"]
    print("Load it with PEFT:\n  from peft import PeftModel\n  from transformers import AutoModelForCausalLM")
    print(f"  policy = PeftModel.from_pretrained({_CLASS}({base!r}), {path!r})")
