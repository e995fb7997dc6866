"""`rlora submit` and `rlora jobs`: runs as jobs of a Ray cluster."""

import sys
from typing import TYPE_CHECKING

import tyro

from rlora.cli.arguments import Jobs, Submit
from rlora.cli.overrides import parse_train

if TYPE_CHECKING:
    from rlora.cluster.jobs import SubmittedJob


def submit_command(arguments: list[str]) -> None:
    """Submit a job, or follow an earlier job, and print the output until the job ends.

    Exits with status 1 if the job does not succeed, and with 130 after Ctrl-C.
    """
    options, train_arguments = tyro.cli(Submit, args=arguments, prog="rlora submit", return_unknown_args=True)
    train_arguments = [str(options.file), *train_arguments] if options.file else train_arguments
    if options.follow is None:
        train = parse_train(train_arguments)  # so that errors are reported here rather than on the cluster
    from rlora.cluster.jobs import job, submit

    if options.follow is not None:
        submitted = job(options.follow, options.address)
    else:
        metadata = {"file": str(options.file or ""), "run_dir": str(train.run_dir or train.resume or "")}
        command = ["python", "-m", "rlora", "train", *train_arguments]
        submitted = submit(
            command, options.address, options.working_dir, options.entrypoint_cpus, options.entrypoint_gpus,
            options.name, metadata,
        )  # fmt: skip
        print(f"job: {submitted.id}", flush=True)
    address = f" --address {options.address}" if options.address else ""
    follow = f"rlora submit --follow {submitted.id}{address}"
    if options.detach:
        print(f"Follow the job: {follow}")
        return
    try:
        failure = submitted.follow(lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        if sys.stdin.isatty() and input("\nStop the job? [y/N] ").strip().lower().startswith("y"):
            _stop(submitted)
            sys.exit(130)
        print(f"\n{submitted.id} continues. Follow the job: {follow}")
        sys.exit(130)
    if failure:
        print(f"rlora: job {submitted.id}: {failure}", file=sys.stderr)
        sys.exit(1)


def jobs_command(arguments: list[str]) -> None:
    """List the jobs that rlora has submitted, or ask one of them to stop."""
    options = tyro.cli(Jobs, args=arguments, prog="rlora jobs")
    from rich.console import Console
    from rich.table import Table

    from rlora.cluster.jobs import job, jobs

    if options.stop:
        _stop(job(options.stop, options.address))
        return
    table = Table("job", "status", "started", "command", box=None)
    for listed in jobs(options.address):
        table.add_row(listed.id, listed.status.lower(), listed.started, listed.command)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _stop(job: "SubmittedJob") -> None:
    stopped = job.stop()
    print(f"{job.id} was asked to stop; the run saves its state first" if stopped else f"{job.id} has already ended")
