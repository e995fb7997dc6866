"""`rlora submit` and `rlora jobs`: runs as jobs of a Ray cluster."""

import sys
from typing import TYPE_CHECKING

import tyro

from rlora.cli.arguments import Jobs, Submit
from rlora.cli.overrides import parse_train

if TYPE_CHECKING:
    from rlora.cluster.jobs import Job


def submit_command(arguments: list[str]) -> None:
    given, of_train = tyro.cli(Submit, args=arguments, prog="rlora submit", return_unknown_args=True)
    of_train = [str(given.file), *of_train] if given.file else of_train
    if given.follow is None:
        train = parse_train(of_train)  # what is wrong with it is told here and not there
    from rlora.cluster.jobs import job, submit

    if given.follow is not None:
        made = job(given.follow, given.address)
    else:
        told = {"file": str(given.file or ""), "run_dir": str(train.run_dir or train.resume or "")}
        command = ["python", "-m", "rlora", "train", *of_train]
        made = submit(
            command, given.address, given.working_dir, given.entrypoint_cpus, given.entrypoint_gpus, given.name, told
        )
        print(f"job: {made.id}", flush=True)
    address = f" --address {given.address}" if given.address else ""
    follow = f"rlora submit --follow {made.id}{address}"
    if given.detach:
        print(f"Follow it: {follow}")
        return
    try:
        failure = made.follow(lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        if sys.stdin.isatty() and input("\nStop the job? [y/N] ").strip().lower().startswith("y"):
            _stop(made)
            sys.exit(130)
        print(f"\n{made.id} goes on. Follow it: {follow}")
        sys.exit(130)
    if failure:
        print(f"rlora: job {made.id}: {failure}", file=sys.stderr)
        sys.exit(1)


def jobs_command(arguments: list[str]) -> None:
    given = tyro.cli(Jobs, args=arguments, prog="rlora jobs")
    from rich.console import Console
    from rich.table import Table

    from rlora.cluster.jobs import job, jobs

    if given.stop:
        _stop(job(given.stop, given.address))
        return
    table = Table("job", "status", "started", "command", box=None)
    for each in jobs(given.address):
        table.add_row(each.id, each.status.lower(), each.started, each.command)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _stop(job: "Job") -> None:
    stopped = job.stop()
    print(f"{job.id} is asked to stop; it saves what it has" if stopped else f"{job.id} has ended already")
