"""Joins a Ray cluster, and says in a sentence why that is not possible."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import ray
from ray.exceptions import AuthenticationError

from rlora.records import RloraError

_ANSWER = 10.0  # seconds in which the head of a cluster has to take a connection
_ADDRESS = "give HOST:PORT of the head node, as `ray start --head` prints it, or local for a cluster of this run's own"
_GONE = "if that cluster has ended, `ray stop` forgets it; RAY_ADDRESS=local starts one for this run"


def join_ray() -> bool:
    """Join the Ray cluster of this job or machine, or start one; returns whether it is this process's own. Raises
    RloraError, in a sentence, where it can't."""
    if ray.is_initialized():
        raise RloraError(
            "Ray: this process is connected already, by ray.init() or by another job of rlora; end that job first, or "
            "call ray.shutdown()"
        )
    asked = os.environ.get("RAY_ADDRESS", "")
    address = asked or ray._private.utils.read_ray_address() or "local"  # what `ray start` has left word of
    where = f"RAY_ADDRESS = {asked!r}" if asked else f"the cluster at {address} that `ray start` began"
    if not address.startswith("ray://") and address not in ("auto", "local"):
        _check_answers(address, where)
    try:
        with _patience_of_ray(address):
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        ray.shutdown()
        if address == "local":
            raise RloraError(f"Ray: no cluster could be started: {first_sentence(error)}") from error
        raise RloraError(f"Ray: {where}: {_reason(error)}") from error
    return address == "local"


def _check_answers(address: str, where: str) -> None:
    """Ray itself waits for minutes where nothing answers."""
    host, _, port = address.rpartition(":")
    if not host.strip() or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise RloraError(f"Ray: {where} is no address; {_ADDRESS}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except OSError as error:
        raise RloraError(f"Ray: {where}: nothing answers there ({error.strerror or error}); {_GONE}") from error


@contextmanager
def _patience_of_ray(address: str) -> Iterator[None]:
    """One attempt, of half a minute, to join a cluster: Ray makes twenty of them."""
    name = "RAY_gcs_server_port_wait_time_s"
    if address == "local" or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _reason(error: BaseException) -> str:
    """Why Ray could not be joined, and what to do, in a sentence."""
    told, cause = "", cast(BaseException | None, error)
    while cause:
        told, cause = f"{told}\n{cause}", cause.__cause__ or cause.__context__
    versions = re.findall(r"^ *(?:Ray|Python): (\S+)$", told, re.MULTILINE)
    if "Version mismatch" in told and len(versions) >= 4:
        return (
            f"it runs Ray {versions[0]} on Python {versions[1]}, and this process Ray {versions[2]} on Python "
            f"{versions[3]}; use the same versions in both, or RAY_ADDRESS=local for a cluster of this run's own"
        )
    if isinstance(error, AuthenticationError) or re.search(
        r"unauthenticated|authentication token", told, re.IGNORECASE
    ):
        return (
            "it wants a token, and this process has none or another; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to what `ray get-auth-token` prints on its head node"
        )
    if "Failed to connect" in told:
        return f"what answers there is no head node that Ray {ray.__version__} can speak with; {_GONE}"
    return f"{first_sentence(error)}; {_GONE}"


def first_sentence(error: BaseException) -> str:
    first = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".")
    return first or type(error).__name__
