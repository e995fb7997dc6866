"""Joins or starts a Ray cluster, and reports in one sentence if that fails."""

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

_TIMEOUT = 10.0  # seconds for the head node to accept a connection
_ADDRESS = "give HOST:PORT of the head node, as `ray start --head` prints it, or local for this run's own cluster"
_GONE = "if that cluster has ended, `ray stop` forgets it; RAY_ADDRESS=local starts one for this run"


def join_ray() -> bool:
    """Join the Ray cluster of this job or machine, or start one. Returns whether it was started.

    Raises RloraError with a message of one sentence if that fails.
    """
    if ray.is_initialized():
        raise RloraError(
            "Ray: this process is already connected, by ray.init() or by another job of rlora; end that job first, or "
            "call ray.shutdown()"
        )
    setting = os.environ.get("RAY_ADDRESS", "")
    address = setting or ray._private.utils.read_ray_address() or "local"  # from a file that `ray start` writes
    source = f"RAY_ADDRESS = {setting!r}" if setting else f"the cluster at {address} that `ray start` began"
    if not address.startswith("ray://") and address not in ("auto", "local"):
        _check_connection(address, source)
    try:
        with _single_attempt(address):
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        ray.shutdown()
        if address == "local":
            raise RloraError(f"Ray: no cluster could be started: {first_sentence(error)}") from error
        raise RloraError(f"Ray: {source}: {_reason(error)}") from error
    return address == "local"


def _check_connection(address: str, source: str) -> None:
    """Raise RloraError if nothing accepts connections at `address`. Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host.strip() or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise RloraError(f"Ray: {source} is no address; {_ADDRESS}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT).close()
    except OSError as error:
        raise RloraError(f"Ray: {source}: nothing answers there ({error.strerror or error}); {_GONE}") from error


@contextmanager
def _single_attempt(address: str) -> Iterator[None]:
    """Limit Ray to one attempt of half a minute to join a cluster, instead of twenty."""
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
    """One sentence: why Ray could not be joined, and the fix."""
    text, cause = "", cast(BaseException | None, error)
    while cause:
        text, cause = f"{text}\n{cause}", cause.__cause__ or cause.__context__
    versions = re.findall(r"^ *(?:Ray|Python): (\S+)$", text, re.MULTILINE)
    if "Version mismatch" in text and len(versions) >= 4:
        return (
            f"it runs Ray {versions[0]} on Python {versions[1]}, and this process Ray {versions[2]} on Python "
            f"{versions[3]}; use the same versions in both, or RAY_ADDRESS=local for this run's own cluster"
        )
    if isinstance(error, AuthenticationError) or re.search(
        r"unauthenticated|authentication token", text, re.IGNORECASE
    ):
        return (
            "it wants a token, and this process has none or a different one; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to what `ray get-auth-token` prints on its head node"
        )
    if "Failed to connect" in text:
        return f"the server there is not a head node that Ray {ray.__version__} can connect to; {_GONE}"
    return f"{first_sentence(error)}; {_GONE}"


def first_sentence(error: BaseException) -> str:
    """First sentence or line of the message; the error's type if it has no message."""
    first = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".")
    return first or type(error).__name__
