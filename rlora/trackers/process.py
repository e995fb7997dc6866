"""Process of one tracker: follows a run's directory and sends completed steps to the tracker.

    python -m rlora.trackers.process    reads a `TrackerJob` as a JSON line from stdin

A line of metrics.jsonl is sent once a later bundle is on disk, because a resume can't repeat the step after that. The
number of the last step sent is stored in <run>/trackers/<name>.json. The next line of stdin ("end" or "failed"), or the
end of stdin, ends the process. SIGTERM is ignored: `ray job stop` sends this signal to all processes of a job, and the
run still logs its end.
"""

import json
import os
import queue
import re
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from upath import UPath

from rlora.records import RloraError
from rlora.run import episodes
from rlora.store import names, read_file, write_file
from rlora.trackers.tracker import Tracked, Tracker, make

_PAUSE = 1.0  # seconds between two reads of the run's directory
_FAR_PAUSE = 20.0  # the same for a run at a URL, where a read takes several requests
_COLUMNS = ("step", "prompt", "completion", "answer", "reward", "status")
_ROWS = 8  # completions per table


@dataclass
class TrackerJob:
    """Parameters of a tracker's process."""

    name: str  # of the tracker
    directory: str  # of the run
    config: dict[str, Any]  # of the run, for the steps from now on
    project: str  # `trackers.project`
    samples_every: int  # steps between two tables of completions; 0: no tables
    patience: float  # seconds until this process ends after the end of the run


class Follower:
    """Reads a run's directory and sends new steps to the tracker, each once."""

    def __init__(self, job: TrackerJob) -> None:
        self.job, self.run = job, UPath(job.directory)
        self._state = self.run / "trackers" / f"{re.sub(r'[^a-zA-Z0-9]+', '-', job.name).strip('-')}.json"
        self.last: int = json.loads(read_file(self._state) or b"{}").get("step", -1)  # number of the last step sent
        self._stored = self.last
        self.tracker: Tracker | None = None

    def start(self) -> None:
        """Construct the tracker if that has not succeeded yet.

        Raises RloraError if the tracker can't be imported or can't track this run, and any exception of its library.
        """
        self.tracker = self.tracker or make(self.job.name, self._tracked(), self.last)

    def catch_up(self) -> None:
        """Send the new steps that a resume can't repeat, and store the number of the last step sent."""
        newest = max(self._bundles(), default=0)
        for line in self._lines():
            if self.last < line["step"] < newest:
                self._send(line)
        if self.tracker:
            self.tracker.flush()
        if self.last != self._stored:
            self._stored = self.last
            (self.run / "trackers").mkdir(parents=True, exist_ok=True)
            write_file(self._state, json.dumps({"step": self.last}).encode())

    def end(self, failed: bool) -> None:
        """Send the remaining steps, and end the tracker's run. `failed` is whether an exception ended the training."""
        self.catch_up()
        if self.tracker:
            self.tracker.finish(failed, json.loads(read_file(self.run / "summary.json") or b"{}"))

    def _send(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        self.start()
        assert self.tracker
        figures = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        figures.pop("step")
        self.tracker.log(step, figures)
        self.last = step
        if self.job.samples_every and step % self.job.samples_every == 0:
            rows = list(self._samples(step))
            if rows:
                self.tracker.samples(step, _COLUMNS, rows)

    def _tracked(self) -> Tracked:
        table = tomllib.loads((read_file(self.run / "config.toml") or b"").decode())
        id = table.get("provenance", {}).get("id", self.run.name)
        return Tracked(self.run.name, id, str(self.run), self.job.project, self.job.config)

    def _lines(self) -> list[dict[str, Any]]:
        lines = (read_file(self.run / "metrics.jsonl") or b"").decode(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _bundles(self) -> list[int]:
        return [int(name) for name in names(self.run / "bundles") if name.isdigit()]

    def _samples(self, step: int) -> Iterator[tuple[Any, ...]]:
        """Yield a row per group, for up to `_ROWS` groups of a step, if the step's bundle contains episodes.

        A row describes the first episode of the group.
        """
        content = read_file(self.run / "bundles" / str(step + 1) / "update.parquet")
        for group in episodes.decode(content, self.run.name)[:_ROWS] if content else ():
            episode = group.episodes[0]
            prompt = group.prompt.text if isinstance(group.prompt.text, str) else json.dumps(group.prompt.text)
            yield step, prompt, episode.text, str(group.prompt.answer), episode.reward, episode.status


def main() -> None:
    """Follow a run until its end, and exit. Errors and readiness are written to stdout, as JSON lines."""
    messages = os.dup(1)
    os.dup2(2, 1)  # keep prints of libraries out of the messages

    def report(error: Exception) -> None:
        """Write an error to stdout, once per text."""
        text = str(error) if isinstance(error, RloraError) else f"{type(error).__name__}: {error}"
        if text not in reported:
            reported.add(text)
            os.write(messages, json.dumps({"error": text}).encode() + b"\n")

    def listen() -> None:
        """Wait for the outcome of the run. Exit with status 1 if the process still runs `patience` seconds later."""
        outcomes.put(sys.stdin.readline().strip())
        time.sleep(job.patience)
        os._exit(1)

    reported: set[str] = set()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = TrackerJob(**json.loads(sys.stdin.readline()))
    follower, outcomes = Follower(job), queue.Queue[str]()
    threading.Thread(target=listen, daemon=True).start()
    try:
        follower.start()
        ready = {"ready": True, "where": getattr(follower.tracker, "where", "")}
        os.write(messages, json.dumps(ready).encode() + b"\n")
    except Exception as error:
        report(error)
        if isinstance(error, RloraError):  # the tracker is not installed, or can't track this run
            os._exit(0)
    outcome = None
    while outcome is None:
        with suppress(queue.Empty):
            outcome = outcomes.get(timeout=_FAR_PAUSE if "://" in job.directory else _PAUSE)
        try:
            follower.catch_up()
        except Exception as error:
            report(error)
    try:
        follower.end(failed=outcome != "end")
    except Exception as error:
        report(error)
    os._exit(0)  # skip exit handlers of libraries, which may hang


if __name__ == "__main__":
    main()
