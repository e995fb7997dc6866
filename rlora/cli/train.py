"""`rlora train`: trains a run, and prints the table at its end."""

import math
from contextlib import nullcontext

from upath import UPath

from rlora.cli.overrides import parse_train
from rlora.run.directory import check_free, summary
from rlora.run.source import reachable

# torch, transformers and Ray take seconds to import, so they are imported after the command line is parsed


_CLASS = "AutoModelForCausalLM.from_pretrained"


def train_command(arguments: list[str]) -> None:
    options = parse_train(arguments)
    if options.run_dir and not options.resume:
        check_free(reachable(options.run_dir), options.overwrite)  # before the slow imports
    from rlora import cluster

    is_done = options.resume is not None and summary(options.resume).get("steps") == options.config.steps
    # Ray starts while this process imports torch and loads the prompts.
    with nullcontext() if is_done else cluster.starting(options.config):
        from rlora.cluster.gauges import Gauges
        from rlora.run.prepare import is_finished, prepared
        from rlora.trackers.tracking import tracked
        from rlora.train import drive

        origin = options.run_dir, options.resume, options.fork, options.overwrite
        with prepared(options.config, *origin, observers=[Gauges()]) as run:
            try:
                # A finished run is not trained: its summary is printed again.
                if not is_finished(run.path, run.config, run.start):
                    print("starting the engines and the learner, which takes half a minute or more", flush=True)
                    with tracked(run):
                        drive([run])
            except BaseException as error:
                error.add_note(f"`rlora train --resume {run.path}` continues from the newest saved step")
                raise
            _report(run.path, run.task.base, run.config.learner.full_finetuning)


def _report(run: UPath, base: str, full: bool) -> None:
    """Print the table at the end of a run, and what to do next."""
    from rich.console import Console
    from rich.table import Column, Table

    from rlora.rollout.evaluate import Interval
    from rlora.run import directory

    summary, figures = directory.summary(run), directory.figures(run)
    table = Table("", Column("", overflow="fold"), title="Result", show_header=False)
    for moment in ("before", "after"):
        if (accuracy := summary.get(f"accuracy/{moment}")) is not None:
            ends = [summary.get(f"accuracy/{moment}/{end}", math.nan) for end in ("low", "high")]
            interval = Interval(accuracy, *ends)
            table.add_row(f"accuracy {moment} training", f"{interval}, {summary['accuracy/prompts']} held-out prompts")
    seconds = sum(line["time/step"] for line in figures)
    table.add_row("training", f"{len(figures)} steps in {seconds:.0f} s")
    table.add_row("total", f"{summary['time/total']:.0f} s, with start and evaluations")
    kind = "all weights" if full else "adapter"
    table.add_row(kind, f"{summary['adapter/parameters']:,} parameters, {summary['adapter/bytes']:,} bytes")
    Console().print(table)
    path = summary["adapter/path"]
    print(f"The {'model' if full else 'adapter'} is in {path}. Evaluate it again, or train to N steps in total:")
    print(f"  rlora eval {run}\n  rlora train --resume {run} --steps=N")
    if full:
        print(f"Load it:\n  from transformers import AutoModelForCausalLM\n  policy = {_CLASS}({path!r})")
        return
    print("Load it with PEFT:\n  from peft import PeftModel\n  from transformers import AutoModelForCausalLM")
    print(f"  policy = PeftModel.from_pretrained({_CLASS}({base!r}), {path!r})")
