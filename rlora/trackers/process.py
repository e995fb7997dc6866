"""The process of one tracker: follows the directory of a run, and hands on the steps that are there to stay.

    python -m rlora.trackers.process    reads a JSON line from stdin: name, directory, project, samples_every

A line of metrics.jsonl is handed on once a later bundle is on the disk: then no resume makes the step come again. What
was handed on is noted in <run>/trackers/<name>.json. The next line of stdin, "end" or "failed", or its end, ends it.
"""

import json
import os
import queue
import sys
import threading
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
_LAST_WORDS = 60.0  # seconds after the end of the run's own process in which this one ends too
_COLUMNS = ("step", "prompt", "completion", "answer", "reward", "status")
_ROWS = 8  # completions in a table


@dataclass
class Follower:
    """What a tracker was told, and what there is to tell."""

    name: str
    run: UPath
    project: str
    samples_every: int
    tracker: Tracker | None = None
    last: int = -1  # the step that was handed on last

    def __post_init__(self) -> None:
        self.last = json.loads(read_file(self._state) or b"{}").get("step", -1)

    @property
    def _state(self) -> UPath:
        return self.run / "trackers" / f"{self.name.rpartition(':')[2]}.json"

    def start(self) -> None:
        """Start the tracker. Raises RloraError where it is not installed, and whatever its library raises."""
        self.tracker = self.tracker or make(self.name, self._tracked(), self.last)

    def catch_up(self) -> None:
        """Hand on the steps that are there to stay."""
        newest = max(self._bundles(), default=0)
        for line in self._lines():
            if self.last < line["step"] < newest:
                self._hand_on(line)
        if self.tracker:
            self.tracker.flush()
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
        if self.samples_every and step % self.samples_every == 0:
            rows = list(self._samples(step))
            if rows:
                self.tracker.samples(step, _COLUMNS, rows)

    def _tracked(self) -> Tracked:
        table = tomllib.loads((read_file(self.run / "config.toml") or b"").decode())
        provenance = table.pop("provenance", {})
        return Tracked(self.run.name, provenance.get("id", self.run.name), str(self.run), self.project, table)

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

    told: set[str] = set()
    asked = json.loads(sys.stdin.readline())
    follower = Follower(asked["name"], UPath(asked["directory"]), asked["project"], asked["samples_every"])
    words: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: words.put(sys.stdin.readline().strip()), daemon=True).start()
    try:
        follower.start()
        os.write(messages, b'{"ready": true}\n')
    except Exception as error:
        tell(error)
        if isinstance(error, RloraError):  # it is not installed
            os._exit(1)
    word = None
    while word is None:
        with suppress(queue.Empty):
            word = words.get(timeout=_PAUSE)
        try:
            follower.catch_up()
        except Exception as error:
            tell(error)
    last_words = threading.Timer(_LAST_WORDS, lambda: os._exit(1))
    last_words.daemon = True
    last_words.start()
    try:
        follower.end(failed=word != "end")
    except Exception as error:
        tell(error)
    os._exit(0)  # without what a library has registered for the end: it may hang


if __name__ == "__main__":
    main()
