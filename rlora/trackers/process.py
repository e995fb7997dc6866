"""The process of one tracker: follows the directory of a run, and hands on the steps that are there to stay.

    python -m rlora.trackers.process    reads a JSON line from stdin: what it is `Asked`

A line of metrics.jsonl is handed on once a later bundle is on the disk: then no resume makes the step come again. What
was handed on is noted in <run>/trackers/<name>.json. The next line of stdin, "end" or "failed", or its end, ends it.
SIGTERM does not: `ray job stop` sends it to all processes of a job, and the run still has something to say.
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

_PAUSE = 1.0  # seconds between two looks at the run
_FAR_PAUSE = 20.0  # of a run at a URL, where each look is a few requests
_COLUMNS = ("step", "prompt", "completion", "answer", "reward", "status")
_ROWS = 8  # completions in a table


@dataclass
class Asked:
    """What a process is to do."""

    name: str  # of the tracker
    directory: str  # of the run
    config: dict[str, Any]  # of the run, as it is from now on
    project: str
    samples_every: int
    patience: float  # seconds after the end of the run in which this process ends too


class Follower:
    """What a tracker was told, and what there is to tell."""

    def __init__(self, asked: Asked) -> None:
        self.asked, self.run = asked, UPath(asked.directory)
        self._state = self.run / "trackers" / f"{re.sub(r'[^a-zA-Z0-9]+', '-', asked.name).strip('-')}.json"
        self.last: int = json.loads(read_file(self._state) or b"{}").get("step", -1)  # the step handed on last
        self._noted = self.last
        self.tracker: Tracker | None = None

    def start(self) -> None:
        """Start the tracker. Raises RloraError where it is not installed, and whatever its library raises."""
        self.tracker = self.tracker or make(self.asked.name, self._tracked(), self.last)

    def catch_up(self) -> None:
        """Hand on the steps that are there to stay."""
        newest = max(self._bundles(), default=0)
        for line in self._lines():
            if self.last < line["step"] < newest:
                self._hand_on(line)
        if self.tracker:
            self.tracker.flush()
        if self.last != self._noted:
            self._noted = self.last
            (self.run / "trackers").mkdir(parents=True, exist_ok=True)
            write_file(self._state, json.dumps({"step": self.last}).encode())

    def end(self, failed: bool) -> None:
        """Hand on the rest, and end the tracker's run."""
        self.catch_up()
        if self.tracker:
            self.tracker.finish(failed, json.loads(read_file(self.run / "summary.json") or b"{}"))

    def _hand_on(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        self.start()
        assert self.tracker
        figures = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        figures.pop("step")
        self.tracker.log(step, figures)
        self.last = step
        if self.asked.samples_every and step % self.asked.samples_every == 0:
            rows = list(self._samples(step))
            if rows:
                self.tracker.samples(step, _COLUMNS, rows)

    def _tracked(self) -> Tracked:
        table = tomllib.loads((read_file(self.run / "config.toml") or b"").decode())
        id = table.get("provenance", {}).get("id", self.run.name)
        return Tracked(self.run.name, id, str(self.run), self.asked.project, self.asked.config)

    def _lines(self) -> list[dict[str, Any]]:
        lines = (read_file(self.run / "metrics.jsonl") or b"").decode(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _bundles(self) -> list[int]:
        return [int(name) for name in names(self.run / "bundles") if name.isdigit()]

    def _samples(self, step: int) -> Iterator[tuple[Any, ...]]:
        """A few of the episodes of a step, as far as its bundle has them."""
        content = read_file(self.run / "bundles" / str(step + 1) / "update.parquet")
        for group in episodes.decode(content, self.run.name)[:_ROWS] if content else ():
            episode = group.episodes[0]
            prompt = group.prompt.text if isinstance(group.prompt.text, str) else json.dumps(group.prompt.text)
            yield step, prompt, episode.text, str(group.prompt.answer), episode.reward, episode.status


def main() -> None:
    """Follow a run until its end."""
    messages = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no message

    def tell(error: Exception) -> None:
        """Say once what is wrong."""
        text = str(error) if isinstance(error, RloraError) else f"{type(error).__name__}: {error}"
        if text not in told:
            told.add(text)
            os.write(messages, json.dumps({"error": text}).encode() + b"\n")

    def listen() -> None:
        """Wait for the word that ends it; from then on its time is limited, whatever it is at."""
        words.put(sys.stdin.readline().strip())
        time.sleep(asked.patience)
        os._exit(1)

    told: set[str] = set()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asked = Asked(**json.loads(sys.stdin.readline()))
    follower, words = Follower(asked), queue.Queue[str]()
    threading.Thread(target=listen, daemon=True).start()
    try:
        follower.start()
        ready = {"ready": True, "where": getattr(follower.tracker, "where", "")}
        os.write(messages, json.dumps(ready).encode() + b"\n")
    except Exception as error:
        tell(error)
        if isinstance(error, RloraError):  # it is not installed, or can't track this run
            os._exit(0)
    word = None
    while word is None:
        with suppress(queue.Empty):
            word = words.get(timeout=_FAR_PAUSE if "://" in asked.directory else _PAUSE)
        try:
            follower.catch_up()
        except Exception as error:
            tell(error)
    try:
        follower.end(failed=word != "end")
    except Exception as error:
        tell(error)
    os._exit(0)  # without what a library has registered for the end: it may hang


if __name__ == "__main__":
    main()
