"""Jobs on a Ray cluster: submitted, followed, stopped and listed over the cluster's own API."""

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
_KIND = {"made_by": "rlora"}  # in the metadata of each job, by which they are listed
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's client takes these before the address that it is given


@dataclass(frozen=True)
class Listed:
    """A job of the cluster."""

    id: str
    status: str
    started: str
    command: str


class Job:
    """A job that was submitted, by this process or another."""

    def __init__(self, where: str, client: JobSubmissionClient, id: str) -> None:
        self.where, self._client, self.id = where, client, id

    def follow(self, tell: Callable[[str], object]) -> str:
        """Hand on what the job prints until its end; return why it did not succeed, empty where it did.

        Raises RloraError where the connection breaks off before the job has ended.
        """

        async def read() -> None:
            async for text in self._client.tail_job_logs(self.id):
                tell(text)

        broken = "its end was not told"
        try:
            asyncio.run(read())
        except RuntimeError as error:
            broken = first_sentence(error)
        with _told(self.where):
            info = self._client.get_job_info(self.id)
        if not info.status.is_terminal():
            raise RloraError(f"{self.where}: the connection to job {self.id} broke off ({broken}); follow it again")
        if info.status == JobStatus.SUCCEEDED:
            return ""
        return f"{info.status.value.lower()}" + (f": {info.message.strip()}" if info.message else "")

    def stop(self) -> bool:
        """Ask it to end; return whether it was running. A run saves what it has."""
        with _told(self.where):
            return bool(self._client.stop_job(self.id))


def submit(
    command: Sequence[str], address: str | None, directory: Path, cpus: float, gpus: float, name: str | None,
    metadata: Mapping[str, str],
) -> Job:  # fmt: skip
    """Have a command run on the cluster, in a copy of `directory`. `cpus` and `gpus` are for its own process.

    Raises RloraError where the cluster does not answer, or does not take the directory.
    """
    client, where = _client(address)
    environment: dict[str, Any] = {"working_dir": str(directory), "excludes": _EXCLUDED}
    try:
        made = client.submit_job(
            entrypoint=shlex.join(command), runtime_env=environment, submission_id=name,
            metadata={**_KIND, **metadata}, entrypoint_num_cpus=cpus, entrypoint_num_gpus=gpus,
        )  # fmt: skip
    except Exception as error:
        why = str(error).strip(" .\n").splitlines()[-1]  # of a traceback of the cluster's, its error
        if re.search(r"exceed|too ?large", why, re.IGNORECASE):
            raise RloraError(
                f"--working-dir {directory}: Ray takes 100 MiB at most ({why}); name what need not go along in a "
                ".gitignore or .rayignore there, or submit from a smaller directory"
            ) from error
        raise RloraError(f"{where}: it has not taken the job: {why}") from error
    return Job(where, client, made)


def job(id: str, address: str | None) -> Job:
    """A job that was submitted before. Raises RloraError where there is none."""
    client, where = _client(address)
    with _told(where):
        found = {each.submission_id for each in client.list_jobs()}
    if id not in found:
        raise RloraError(f"{id}: {where} has no such job; `rlora jobs` lists them")
    return Job(where, client, id)


def jobs(address: str | None) -> list[Listed]:
    """Those that rlora has submitted to a cluster, the newest first."""
    client, where = _client(address)
    with _told(where):
        found = [each for each in client.list_jobs() if (each.metadata or {}).items() >= _KIND.items()]
    found.sort(key=lambda each: each.start_time or 0, reverse=True)
    return [
        Listed(
            each.submission_id or "", str(each.status.value),
            datetime.fromtimestamp((each.start_time or 0) / 1000).isoformat(" ", "seconds"), each.entrypoint,
        )
        for each in found
    ]  # fmt: skip


def _client(address: str | None) -> tuple[JobSubmissionClient, str]:
    """A connection to the cluster, and what it is called in errors.

    Raises RloraError where it does not answer, or where its Ray is too old.
    """
    variable = next((name for name in _ADDRESSES if os.environ.get(name)), None)
    set_by = f"{variable} = {os.environ[variable]}" if variable else "no --address is given, and no cluster runs here"
    where = f"--address {address}" if address else set_by
    try:
        with _without(_ADDRESSES if address else ()):
            client = JobSubmissionClient(address)
    except Exception as error:
        raise RloraError(
            f"{where}: {first_sentence(error)}; give http://HOST:8265 of the head node's dashboard (this is Ray "
            f"{ray.__version__}; a cluster of an older release may not speak with it)"
        ) from error
    there = getattr(client, "_server_ray_version", None)
    if there and Version(there) < Version(OLDEST_RAY):
        raise RloraError(
            f"{where}: the cluster runs Ray {there}, and rlora needs {OLDEST_RAY} or later; install Ray "
            f"{ray.__version__}, as here, on its nodes"
        )
    return client, where if address or variable else "the cluster of this machine"


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Without some variables of the environment."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Raises RloraError for what a call of the cluster raises."""
    try:
        yield
    except Exception as error:
        raise RloraError(f"{where}: {first_sentence(error)}; try again once its dashboard answers") from error
