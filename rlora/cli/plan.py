"""`rlora plan`: what a run will take, line by line."""

from rlora.cli.overrides import parse_plan
from rlora.records import RloraError

# torch, transformers and Ray take seconds to import: that waits until the command line is understood


def plan_command(arguments: list[str]) -> None:
    given = parse_plan(arguments)
    from rich.console import Console
    from rich.table import Table

    from rlora.planning import gib, plan

    if given.gpus < 1:
        raise RloraError(f"--gpus {given.gpus}: give 1 or more")
    made = plan(given.config, given.gpu, given.gpus)
    table = Table("", "what", "memory", title=f"{given.config.model} on {made.where}, {gib(made.total)}")
    for who, what, size in made.lines:
        table.add_row(who, what, size)
    Console().print(table)
    where = ("on one card" if made.shared else "each on a card of its own") if made.on_gpu else "in RAM"
    print(f"Learner and engine are {where}; {gib(made.total - made.taken)} are left.")
    whole = sum(made.seconds.values())
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in made.seconds.items())
    print(
        f"A step takes about {whole:.0f} s ({phases}), where completions are half as long as sampling.max_tokens on "
        "average. Seconds are arithmetic, not a measurement."
    )
    if made.faults:
        raise RloraError("this does not fit:\n" + "\n".join(made.faults))
