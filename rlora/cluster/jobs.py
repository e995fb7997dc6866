"""Jobs on a Ray cluster: submitted, followed, stopped and listed over the cluster's own API."""

import asyncio
import shlex
from collections.abc import Callable, Mapping, Sequence
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
_KIND = {"made_by": "rlora"}  # in the metadata of each job, by which they are listed


@dataclass(frozen=True)
class Listed:
    """A job of the cluster."""

    id: str
    status: str
    started: str
    command: str
    message: str  # why it has failed


class Job:
    """A job that was submitted, by this process or another."""

    def __init__(self, address: str, client: JobSubmissionClient, id: str) -> None:
        self.address, self._client, self.id = address, client, id

    def follow(self, tell: Callable[[str], object]) -> bool:
        """Hand on what the job prints until its end; return whether it has succeeded.

        Raises RloraError where the connection breaks off.
        """

        async def read() -> None:
            async for text in self._client.tail_job_logs(self.id):
                tell(text)

        try:
            asyncio.run(read())
        except RuntimeError as error:
            if not self.status.is_terminal():
                raise RloraError(f"{self.address}: the connection to job {self.id} broke off ({error})") from error
        return self.status == JobStatus.SUCCEEDED

    @property
    def status(self) -> JobStatus:
        return self._client.get_job_status(self.id)

    def stop(self) -> None:
        """Ask it to end; a run saves what it has."""
        self._client.stop_job(self.id)


def submit(
    command: Sequence[str], address: str | None, directory: Path, cpus: float, gpus: float, name: str | None,
    metadata: Mapping[str, str],
) -> Job:  # fmt: skip
    """Have a command run on the cluster, in a copy of `directory`. `cpus` and `gpus` are for its own process.

    Raises RloraError where the cluster does not answer, or does not take the directory.
    """
    client, where = _client(address), address or "the cluster of this machine"
    environment: dict[str, Any] = {"working_dir": str(directory), "excludes": _EXCLUDED}
    try:
        made = client.submit_job(
            entrypoint=shlex.join(command), runtime_env=environment, submission_id=name,
            metadata={**_KIND, **metadata}, entrypoint_num_cpus=cpus, entrypoint_num_gpus=gpus,
        )  # fmt: skip
    except Exception as error:
        text = str(error)
        if "exceeds" in text or "too large" in text.lower():
            raise RloraError(
                f"--working-dir {directory}: Ray does not take it ({first_sentence(error)}); name what need not go "
                "along in a .gitignore or .rayignore there, or submit from a smaller directory"
            ) from error
        raise RloraError(f"{where}: it has not taken the job: {first_sentence(error)}") from error
    return Job(where, client, made)


def job(id: str, address: str | None) -> Job:
    """A job that was submitted before. Raises RloraError where there is none."""
    client, where = _client(address), address or "the cluster of this machine"
    found = {each.submission_id for each in client.list_jobs()}
    if id not in found:
        raise RloraError(f"{id}: {where} has no such job; `rlora jobs` lists them")
    return Job(where, client, id)


def jobs(address: str | None) -> list[Listed]:
    """Those that rlora has submitted to a cluster, the newest first."""
    found = [each for each in _client(address).list_jobs() if (each.metadata or {}).items() >= _KIND.items()]
    found.sort(key=lambda each: each.start_time or 0, reverse=True)
    return [
        Listed(
            each.submission_id or "", str(each.status.value),
            datetime.fromtimestamp((each.start_time or 0) / 1000).isoformat(" ", "seconds"),
            each.entrypoint, (each.message or "") if each.status == JobStatus.FAILED else "",
        )
        for each in found
    ]  # fmt: skip


def _client(address: str | None) -> JobSubmissionClient:
    """A connection to the cluster. Raises RloraError where it does not answer, or where its Ray is too old."""
    try:
        client = JobSubmissionClient(address)
    except Exception as error:
        where = f"--address {address}" if address else "no --address is given, and no cluster runs here"
        raise RloraError(
            f"{where}: {first_sentence(error)}; give http://HOST:8265 of the head node's dashboard (this is Ray "
            f"{ray.__version__}; a cluster of an older release may not speak with it)"
        ) from error
    there = getattr(client, "_server_ray_version", None)
    if there and Version(there) < Version(OLDEST_RAY):
        raise RloraError(
            f"--address {address}: the cluster runs Ray {there}, and rlora needs {OLDEST_RAY} or later; install Ray "
            f"{ray.__version__}, as here, on its nodes"
        )
    return client
