"""Submits, follows, stops and lists jobs of a Ray cluster, through Ray's job submission API."""

import asyncio
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
from packaging.version import Version
from ray.job_submission import JobStatus, JobSubmissionClient

from rlora.cluster.joining import first_sentence
from rlora.records import RloraError

OLDEST_RAY = "2.50"  # as in pyproject.toml
_EXCLUDED = [".git", ".venv", "runs", "**/__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"]
_KIND = {"made_by": "rlora"}  # in the metadata of every submitted job; `jobs` lists jobs by it
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in Ray's client they take precedence over its argument


@dataclass(frozen=True)
class JobInfo:
    """A job of a Ray cluster, as `jobs` returns it."""

    id: str
    status: str  # Ray's, such as RUNNING
    started: str  # local time
    command: str


class SubmittedJob:
    """A job on a Ray cluster, as `submit` and `job` return it. `cluster` names the cluster in error messages."""

    def __init__(self, cluster: str, client: JobSubmissionClient, id: str) -> None:
        self.cluster, self._client, self.id = cluster, client, id

    def follow(self, write: Callable[[str], object]) -> str:
        """Block until the job ends, and pass its output to `write` piece by piece.

        Returns an empty string if the job succeeded, else the status with Ray's message, such as "failed: ...". Raises
        RloraError if the connection is lost before the job has ended.
        """

        async def read() -> None:
            async for text in self._client.tail_job_logs(self.id):
                write(text)

        reason = "the output stopped"
        try:
            asyncio.run(read())
        except RuntimeError as error:
            reason = first_sentence(error)
        with _cluster_errors(self.cluster):
            info = self._client.get_job_info(self.id)
        if not info.status.is_terminal():
            raise RloraError(
                f"{self.cluster}: the connection to job {self.id} was lost ({reason}), and the job has not ended; run "
                f"`rlora submit --follow {self.id}`, with the same --address if there was one"
            )
        if info.status == JobStatus.SUCCEEDED:
            return ""
        return f"{info.status.value.lower()}" + (f": {info.message.strip()}" if info.message else "")

    def stop(self) -> bool:
        """Ask the job to end, without waiting for the end. Returns whether the job was running.

        Ray sends SIGTERM to the job's process. A run in the job saves its state before the process exits.
        """
        with _cluster_errors(self.cluster):
            return bool(self._client.stop_job(self.id))


def submit(
    command: Sequence[str], address: str | None, directory: Path, cpus: float, gpus: float, name: str | None,
    metadata: Mapping[str, str],
) -> SubmittedJob:  # fmt: skip
    """Submit a command to the cluster at `address`, and return the job without waiting for its start.

    The command runs in a copy of `directory`, and its own process reserves `cpus` and `gpus`. `name` becomes the job's
    id (None: Ray chooses an id), and `metadata` is saved with the job. Without `address`, RAY_API_SERVER_ADDRESS,
    RAY_ADDRESS or this machine's cluster is used. Raises RloraError if the connection fails or the cluster rejects the
    job.
    """
    client, cluster = _client(address)
    environment: dict[str, Any] = {"working_dir": str(directory), "excludes": _EXCLUDED}
    try:
        id = client.submit_job(
            entrypoint=shlex.join(command), runtime_env=environment, submission_id=name,
            metadata={**_KIND, **metadata}, entrypoint_num_cpus=cpus, entrypoint_num_gpus=gpus,
        )  # fmt: skip
    except Exception as error:
        reason = str(error).strip(" .\n").splitlines()[-1]  # may be a traceback from the cluster: keep its error
        if re.search(r"exceed|too ?large", reason, re.IGNORECASE):
            raise RloraError(
                f"--working-dir {directory}: Ray accepts at most 100 MiB ({reason}); exclude files by a .gitignore or "
                ".rayignore in this directory, or submit from a smaller directory"
            ) from error
        raise RloraError(
            f"{cluster}: the cluster rejected the job: {reason}; correct the option that the reason names "
            "(submission_id is --name)"
        ) from error
    return SubmittedJob(cluster, client, id)


def job(id: str, address: str | None) -> SubmittedJob:
    """Return the job with this id that was submitted earlier. Raises RloraError if the cluster has no such job."""
    client, cluster = _client(address)
    with _cluster_errors(cluster):
        ids = {details.submission_id for details in client.list_jobs()}
    if id not in ids:
        raise RloraError(f"job {id}: {cluster} has no job with this id; `rlora jobs` lists the ids")
    return SubmittedJob(cluster, client, id)


def jobs(address: str | None) -> list[JobInfo]:
    """Return the jobs that `rlora submit` has sent to the cluster at `address`, newest first."""
    client, cluster = _client(address)
    with _cluster_errors(cluster):
        submitted = [details for details in client.list_jobs() if (details.metadata or {}).items() >= _KIND.items()]
    submitted.sort(key=lambda details: details.start_time or 0, reverse=True)
    return [
        JobInfo(
            details.submission_id or "", str(details.status.value),
            datetime.fromtimestamp((details.start_time or 0) / 1000).isoformat(" ", "seconds"), details.entrypoint,
        )
        for details in submitted
    ]  # fmt: skip


def _client(address: str | None) -> tuple[JobSubmissionClient, str]:
    """Connect to the cluster. Returns the client, and the cluster's name for error messages.

    Raises RloraError if the connection fails, or if the cluster's release of Ray is too old.
    """
    variable = next((name for name in _ADDRESSES if os.environ.get(name)), None)
    default = f"{variable} = {os.environ[variable]}" if variable else "no --address is set, and no cluster runs here"
    cluster = f"--address {address}" if address else default
    try:
        with _without_variables(_ADDRESSES if address else ()):
            client = JobSubmissionClient(address)
    except Exception as error:
        raise RloraError(
            f"{cluster}: {first_sentence(error)}; give http://HOST:8265, the dashboard of the head node, as --address. "
            f"If this is the address, install the cluster's release of Ray here (this machine has {ray.__version__})"
        ) from error
    cluster_version = getattr(client, "_server_ray_version", None)
    if cluster_version and Version(cluster_version) < Version(OLDEST_RAY):
        raise RloraError(
            f"{cluster}: the cluster runs Ray {cluster_version}, and rlora needs {OLDEST_RAY} or later; install Ray "
            f"{ray.__version__}, as on this machine, on the cluster's nodes"
        )
    return client, cluster if address or variable else "the cluster of this machine"


@contextmanager
def _without_variables(names: Sequence[str]) -> Iterator[None]:
    """Remove environment variables for the duration of a block."""
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)


@contextmanager
def _cluster_errors(cluster: str) -> Iterator[None]:
    """Replace any exception of a call to the cluster by a RloraError."""
    try:
        yield
    except Exception as error:
        raise RloraError(f"{cluster}: {first_sentence(error)}; try again once the cluster's dashboard is up") from error
