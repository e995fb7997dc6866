"""Has a run tracked: a process for each tracker, which costs a warning and never a step."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict

from rlora.records import RloraError
from rlora.run.directory import warn
from rlora.run.run import Run
from rlora.trackers.process import Asked

_GRACE = 5.0  # seconds in which a process is gone that has ended itself
_START = 60.0  # seconds in which a tracker has to be ready, with `trackers.strict`


class _Process:
    """A tracker's process. What goes wrong in it is told as a warning."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.settings = name, run.config.trackers
        self.ready, self.error, self._ending = threading.Event(), "", False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlora.trackers.process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)},
            start_new_session=True,  # Ctrl-C is for the run, which ends it
        )  # fmt: skip
        given = self.settings.project, self.settings.samples_every, self.settings.patience
        self.say(json.dumps(asdict(Asked(name, str(run.place), asdict(run.config), *given))), last=False)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def require(self) -> None:
        """Wait until it is ready. Raises RloraError where it can't be."""
        deadline = time.monotonic() + _START
        while not self.ready.wait(0.1):
            if self.error or self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self._reader.join(timeout=5.0)  # which may have read why just now
                reason = self.error or f"it was not ready after {_START:.0f} s"
                raise RloraError(f"trackers.strict = true: {self.name}: {reason}")

    def wait(self) -> None:
        """Wait until it has handed on the rest. One that hangs ends itself after `trackers.patience` seconds."""
        try:
            self.process.wait(self.settings.patience + _GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._reader.join(timeout=_GRACE)

    def say(self, word: str, last: bool = True) -> None:
        """Send a line, after which none comes where it is the last."""
        assert self.process.stdin
        self._ending = last
        with suppress(OSError):  # it is gone, and has said why
            self.process.stdin.write(f"{word}\n")
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
                        print(f"tracker {self.name}: {message['where']}", flush=True)
                else:
                    self._note(message["error"])
        status = self.process.wait()
        if status and self._ending:
            patience = f"trackers.patience = {self.settings.patience:g} s"
            warn(f"tracker {self.name}: it has not ended after {patience}; all figures stand in metrics.jsonl")
        elif status and not self.error:
            self._note(f"its process ended with status {status}")

    def _note(self, error: str) -> None:
        self.error = error
        if self.ready.is_set() or not self.settings.strict:  # else it is raised
            warn(f"tracker {self.name}: {error}; training goes on")


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Have the run tracked within by what `trackers.use` names.

    Raises RloraError, with `trackers.strict`, where a tracker can't start.
    """
    processes = [_Process(name, run) for name in run.config.trackers.use]
    try:
        if run.config.trackers.strict:
            for each in processes:
                each.require()
        yield
    except BaseException:
        _end(processes, "failed")
        raise
    _end(processes, "end")


def _end(processes: Sequence[_Process], word: str) -> None:
    for each in processes:
        each.say(word)
    for each in processes:
        each.wait()
