"""`rlora plan`: the predicted memory and time of a run."""

from rlora.cli.arguments import Plan
from rlora.cli.overrides import parse_source
from rlora.records import RloraError

# torch, transformers and Ray take seconds to import, so they are imported after the command line is parsed


def plan_command(arguments: list[str]) -> None:
    """Print the plan of a run. Raises RloraError, with what to change, if the run does not fit."""
    options = parse_source(Plan, "rlora plan", arguments)
    from rich.console import Console
    from rich.table import Table

    from rlora.planning import gib, plan

    if options.gpus < 1:
        raise RloraError(f"--gpus {options.gpus}: a plan needs a GPU; use 1 or more")
    prediction = plan(options.config, options.gpu, options.gpus)
    table = Table("", "what", "memory", title=f"{options.config.model} on {prediction.device}, {gib(prediction.total)}")
    for process, part, size in prediction.lines:
        table.add_row(process, part, size)
    Console().print(table)
    separate = options.config.engines and not prediction.shared
    placement = ("each on its own GPU" if separate else "on one GPU") if prediction.on_gpu else "in RAM"
    processes = "Learner and engine are" if options.config.engines else "The learner is"
    print(f"{processes} {placement}; {gib(prediction.total - prediction.used)} are left.")
    seconds = sum(prediction.seconds.values())
    phases = ", ".join(f"{name} {duration:.1f} s" for name, duration in prediction.seconds.items())
    print(
        f"A step takes about {seconds:.0f} s ({phases}), if completions are on average half as long as "
        "sampling.max_tokens. The times are computed, not measured."
    )
    if prediction.faults:
        raise RloraError("the run does not fit:\n" + "\n".join(prediction.faults))
