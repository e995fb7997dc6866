"""Joins or starts a Ray cluster, and reports in one sentence if that fails."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import ray
from ray._private.node import Node
from ray.exceptions import AuthenticationError

from rlora.records import RloraError

_TIMEOUT = 10.0  # seconds for the head node to accept a connection
# Ray would start one worker per core ahead. Actors with environment variables of their own cannot use these.
_NO_IDLE_WORKERS = {"prestart_worker_first_driver": False}
_ADDRESS = (
    "set RAY_ADDRESS to HOST:PORT of the head node, as `ray start --head` prints it, or to local, which starts a "
    "cluster for this run"
)
_GONE = (
    "if that cluster has ended, run `ray stop` to remove its address, or set RAY_ADDRESS=local to start a cluster for "
    "this run"
)


def join_ray() -> bool:
    """Join the Ray cluster that RAY_ADDRESS names or that `ray start` began on this machine, else start a cluster.

    Blocks until this process is connected. Returns True if a cluster was started. Raises RloraError, with a message of
    one line, if that fails.
    """
    if ray.is_initialized():
        raise RloraError(
            "Ray: this process is already connected to a cluster, by ray.init() or by another job of rlora; end that "
            "job first, or call ray.shutdown()"
        )
    setting = os.environ.get("RAY_ADDRESS", "")
    address = setting or ray._private.utils.read_ray_address() or "local"  # from a file that `ray start` writes
    source = f"RAY_ADDRESS = {setting!r}" if setting else f"the cluster at {address} that `ray start` began"
    if not address.startswith("ray://") and address not in ("auto", "local"):
        _check_connection(address, source)
    try:
        with _single_attempt(address), _few_processes():
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _system_config=_NO_IDLE_WORKERS if address == "local" else None,
            )
    except Exception as error:
        ray.shutdown()
        if address == "local":
            raise RloraError(
                f"Ray: no cluster could be started: {first_sentence(error)}; Ray's logs are in "
                "/tmp/ray/session_latest/logs"
            ) from error
        raise RloraError(f"Ray: {source}: {_reason(error)}") from error
    return address == "local"


def _check_connection(address: str, source: str) -> None:
    """Raise RloraError if nothing accepts connections at `address`. Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host.strip() or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise RloraError(f"Ray: {source} is not an address; {_ADDRESS}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT).close()
    except OSError as error:
        raise RloraError(f"Ray: {source}: the connection failed ({error.strerror or error}); {_GONE}") from error


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


@contextmanager
def _few_processes() -> Iterator[None]:
    """Keep Ray from starting processes that a run has no use for, and that no option of `ray.init` turns off.

    These are the dashboard, for whose port Ray waits 2 s in spite of `include_dashboard=False`, because it also sends
    usage statistics; the monitor of the autoscaler; and the monitor of log files, in spite of `log_to_driver=False`.
    """
    names = "start_api_server", "start_monitor", "start_log_monitor"
    with ExitStack() as stack:
        for name in names:
            stack.callback(setattr, Node, name, getattr(Node, name))
            setattr(Node, name, lambda *_, **__: None)
        yield


def _reason(error: BaseException) -> str:
    """Return one sentence that says why Ray could not be joined, and the fix."""
    text, cause = "", cast(BaseException | None, error)
    while cause:
        text, cause = f"{text}\n{cause}", cause.__cause__ or cause.__context__
    versions = re.findall(r"^ *(?:Ray|Python): (\S+)$", text, re.MULTILINE)
    if "Version mismatch" in text and len(versions) >= 4:
        return (
            f"the cluster runs Ray {versions[0]} on Python {versions[1]}, and this process runs Ray {versions[2]} on "
            f"Python {versions[3]}; install the same versions, or set RAY_ADDRESS=local to start a cluster for this run"
        )
    if isinstance(error, AuthenticationError) or re.search(
        r"unauthenticated|authentication token", text, re.IGNORECASE
    ):
        return (
            "the cluster requires a token, and this process has no token or a different one; set RAY_AUTH_MODE=token, "
            "and set RAY_AUTH_TOKEN to the output of `ray get-auth-token` on the head node (or RAY_AUTH_TOKEN_PATH to "
            "a file with this output)"
        )
    if "Failed to connect" in text:
        return f"the server there is not a head node that Ray {ray.__version__} can connect to; {_GONE}"
    return f"{first_sentence(error)}; {_GONE}"


def first_sentence(error: BaseException) -> str:
    """Return the first sentence or line of the error's message, or the error's type if the message is empty."""
    first = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".")
    return first or type(error).__name__
