"""`rlora train`: what a run starts with or goes on from, and the table at its end."""

import sys

from upath import UPath

from rlora.cli.overrides import parse_train

# torch, transformers and Ray take seconds to import: that waits until the command line is understood


def train_command(arguments: list[str]) -> None:
    given = parse_train(arguments)
    from rlora.cluster.gauges import Gauges
    from rlora.run.prepare import is_finished, prepared
    from rlora.trackers.tracking import tracked
    from rlora.train import drive

    with prepared(given.config, given.run_dir, given.resume, given.fork, given.overwrite, observers=[Gauges()]) as run:
        try:
            # A finished run is not trained: its summary is printed again.
            if not is_finished(run.place, run.config, run.start):
                with tracked(run):
                    drive([run])
        except BaseException:
            print(f"`rlora train --resume {run.place}` goes on from what is saved there", file=sys.stderr)
            raise
        _report(run.place, run.task.base, run.config.learner.whole)


def _report(run: UPath, base: str, whole: bool) -> None:
    """The table at the end of a run, and what to do next."""
    from rich.console import Console
    from rich.table import Column, Table

    from rlora.run import directory

    summary = directory.summary(run)
    table = Table("", Column("", overflow="fold"), title="What it gained", show_header=False)
    if "accuracy/prompts" in summary:
        table.add_row("held-out prompts, answered greedily", str(summary["accuracy/prompts"]))
    for when in ("before", "after"):
        if (accuracy := summary.get(f"accuracy/{when}")) is not None:
            table.add_row(f"accuracy {when}", f"{accuracy:.3f}")
    table.add_row("steps", str(summary["steps"]))
    table.add_row("wall time", f"{summary['time/total']:.0f} s, of which training {summary['time/train']:.0f} s")
    table.add_row(
        "all weights" if whole else "adapter",
        f"{summary['adapter/parameters']:,} parameters, {summary['adapter/bytes']:,} bytes",
    )
    table.add_row("where it lies", summary["adapter/path"])
    Console().print(table)
    print(f"Evaluate it again, or go on to N steps in all:\n  rlora eval {run}")
    print(f"  rlora train --resume {run} --set steps=N")
    if whole:
        print(f"Load it:\n  policy = AutoModelForCausalLM.from_pretrained({summary['adapter/path']!r})")
        return
    print(f"Load it with PEFT:\n  base = AutoModelForCausalLM.from_pretrained({base!r})")
    print(f"  policy = PeftModel.from_pretrained(base, {summary['adapter/path']!r})")
