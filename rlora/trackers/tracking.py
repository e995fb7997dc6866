"""Starts one process per tracker of a run. A failing tracker causes a warning and never delays a step."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict

from rlora.records import RloraError
from rlora.run.run import Run
from rlora.trackers.process import TrackerJob

_log = logging.getLogger(__name__)

_GRACE = 5.0  # seconds for a process to exit after it ended itself
_START = 60.0  # seconds for a tracker to become ready, with `trackers.strict`


class _Process:
    """Handle of the process that runs a tracker. A thread reads the exceptions that the process reports, and logs them
    as warnings."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.settings = name, run.config.trackers
        self.ready, self.error, self._ending = threading.Event(), "", False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlora.trackers.process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
            start_new_session=True,  # without Ctrl-C: the run ends it
        )  # fmt: skip
        settings = self.settings.project, self.settings.samples_every, self.settings.patience
        self.send(json.dumps(asdict(TrackerJob(name, str(run.path), asdict(run.config), *settings))), last=False)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def require(self) -> None:
        """Block until the tracker is ready, for at most `_START` seconds.

        Raises RloraError, and kills the process, if the tracker fails to start.
        """
        deadline = time.monotonic() + _START
        while not self.ready.wait(0.1):
            if self.error or self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self._reader.join(timeout=5.0)  # it may just have read the reason
                reason = self.error or f"the tracker was not ready after {_START:.0f} s"
                fix = "fix the tracker, or set trackers.strict = false to train without it"
                raise RloraError(f"trackers.strict = true: {self.name}: {reason}; {fix}")

    def wait(self) -> None:
        """Block until the process has sent the remaining steps and has ended.

        A hanging process ends itself after `trackers.patience` seconds, and is killed `_GRACE` seconds later.
        """
        try:
            self.process.wait(self.settings.patience + _GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._reader.join(timeout=_GRACE)

    def send(self, line: str, last: bool = True) -> None:
        """Write a line to the process's stdin, and close stdin if the line is the `last`."""
        assert self.process.stdin
        self._ending = last
        with suppress(OSError):  # the process has ended, after reporting the reason
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        if last:
            with suppress(OSError):
                self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                message = json.loads(line)
                if message.get("ready"):
                    self.ready.set()
                    if message["where"]:
                        _log.info("tracker %s: %s", self.name, message["where"])
                else:
                    self._report(message["error"])
        status = self.process.wait()
        if status and self._ending:
            patience = f"trackers.patience = {self.settings.patience:g} s"
            _log.warning(
                f"tracker {self.name}: it did not end within {patience}, so it may lack the last steps; raise "
                "trackers.patience for the next run (metrics.jsonl has all metrics)"
            )
        elif status and not self.error:
            self._report(f"the tracker's process ended with status {status}")

    def _report(self, error: str) -> None:
        self.error = error
        if self.ready.is_set() or not self.settings.strict:  # otherwise `require` raises it
            _log.warning(f"tracker {self.name}: {error}; training continues")


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Run the trackers in `trackers.use` within the context, each in a process of its own.

    Entering the context does not block. With `trackers.strict` it blocks until the trackers are ready, and raises
    RloraError if one fails to start. All other errors are logged as warnings. Leaving the context blocks until each
    process has sent the remaining steps, for at most about `trackers.patience` seconds.
    """
    processes = [_Process(name, run) for name in run.config.trackers.use]
    try:
        if run.config.trackers.strict:
            for process in processes:
                process.require()
        yield
    except BaseException:
        _end(processes, "failed")
        raise
    _end(processes, "end")


def _end(processes: Sequence[_Process], outcome: str) -> None:
    for process in processes:
        process.send(outcome)
    for process in processes:
        process.wait()
