"""`rlora train`: what a run starts with or goes on from, and the table at its end."""

import math

from upath import UPath

from rlora.cli.overrides import parse_train
from rlora.run.directory import check_free
from rlora.run.source import reachable

# torch, transformers and Ray take seconds to import: that waits until the command line is understood


_CLASS = "AutoModelForCausalLM.from_pretrained"


def train_command(arguments: list[str]) -> None:
    given = parse_train(arguments)
    if given.run_dir and not given.resume:
        check_free(reachable(given.run_dir), given.overwrite)  # before the seconds that the imports take
    from rlora.cluster.gauges import Gauges
    from rlora.run.prepare import is_finished, prepared
    from rlora.trackers.tracking import tracked
    from rlora.train import drive

    with prepared(given.config, given.run_dir, given.resume, given.fork, given.overwrite, observers=[Gauges()]) as run:
        try:
            # A finished run is not trained: its summary is printed again.
            if not is_finished(run.place, run.config, run.start):
                print("starting the engines and the learner, which takes half a minute or more", flush=True)
                with tracked(run):
                    drive([run])
        except BaseException as error:
            error.add_note(f"`rlora train --resume {run.place}` continues from the newest saved step")
            raise
        _report(run.place, run.task.base, run.config.learner.full_finetuning)


def _report(run: UPath, base: str, whole: bool) -> None:
    """The table at the end of a run, and what to do next."""
    from rich.console import Console
    from rich.table import Column, Table

    from rlora.rollout.evaluate import Interval
    from rlora.run import directory

    summary, figures = directory.summary(run), directory.figures(run)
    table = Table("", Column("", overflow="fold"), title="Result", show_header=False)
    for when in ("before", "after"):
        if (accuracy := summary.get(f"accuracy/{when}")) is not None:
            ends = [summary.get(f"accuracy/{when}/{end}", math.nan) for end in ("low", "high")]
            interval = Interval(accuracy, *ends)
            table.add_row(f"accuracy {when} training", f"{interval}, {summary['accuracy/prompts']} held-out prompts")
    trained = sum(line["time/step"] for line in figures)
    table.add_row("training", f"{len(figures)} steps in {trained:.0f} s")
    table.add_row("this process", f"{summary['time/total']:.0f} s, with the start and the evaluations")
    kind = "all weights" if whole else "adapter"
    table.add_row(kind, f"{summary['adapter/parameters']:,} parameters, {summary['adapter/bytes']:,} bytes")
    Console().print(table)
    path = summary["adapter/path"]
    print(f"The {'model' if whole else 'adapter'} is in {path}. Evaluate it again, or train to N steps in all:")
    print(f"  rlora eval {run}\n  rlora train --resume {run} --set steps=N")
    if whole:
        print(f"Load it:\n  from transformers import AutoModelForCausalLM\n  policy = {_CLASS}({path!r})")
        return
    print("Load it with PEFT:\n  from peft import PeftModel\n  from transformers import AutoModelForCausalLM")
    print(f"  policy = PeftModel.from_pretrained({_CLASS}({base!r}), {path!r})")
