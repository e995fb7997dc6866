"""Writes a run's bundles and metrics while the next step goes on, whatever the disk does."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Thread

from upath import UPath

from rlora import machine
from rlora.records import Adapter, Cursor, Group, RloraError, SaveStats
from rlora.rollout.stream import Collection
from rlora.rollout.task import HELD_OUT
from rlora.run import episodes
from rlora.run.checkpoint import BUNDLES, Bundle, Rewards, bundle_path, versions
from rlora.run.directory import METRICS, Provenance, warn, whole_lines
from rlora.settings import Config
from rlora.store import remove, remove_halves, write_directory, write_file


class CheckpointWriter:
    """Keeps a run on a thread of its own: the loop waits for nothing but the bundle before.

    Where the disk does not take a bundle training goes on in memory, loudly, and each step tries again with the newest.
    After `checkpoint.patience` seconds of that, or of waiting for one write, or at the end, the newest is put where
    there is room, and RloraError says where. `start` is the bundle that the run goes on from.
    """

    def __init__(self, run: UPath, config: Config, origin: Provenance, start: Bundle | None) -> None:
        self.run, self.config, self.origin = run, config, origin
        self.saved: SaveStats | None = None
        self._parent = start.adapter.digest if start else None
        self._rewards: dict[int, Rewards] = dict(start.rewards) if start else {}
        self._idle = Event()  # nothing is being written; until then nothing here changes but by the thread
        self._idle.set()
        self._unsaved: Bundle | None = None  # the newest, as long as the disk has not taken it
        self._failing_since: float | None = None
        self._stuck: set[int] = set()  # versions whose bundles can't be removed
        remove_halves(run / BUNDLES)
        self._logged = self._keep_lines_before(start.version if start else 0)  # bytes
        self._unlogged = b""
        self._accuracies: dict[int, float] = {}  # on the held-out prompts, of the versions that were evaluated
        for line in whole_lines(run):
            self._count_accuracy(line)
        self._ended = False

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Have everything on the disk, or the newest bundle elsewhere. Ctrl-C ends the wait for a disk that does not
        answer, once that has been told of, and nothing else."""
        if self._ended:
            return
        try:
            if self._wait(ending=True) and (self._unsaved or self._unlogged):
                self._start(partial(self._write, self._unsaved) if self._unsaved else self._log)
                self._wait(ending=True)
        finally:
            left = self._unsaved  # which a write that wakes up now takes away
            error = self._put_elsewhere(left) if left else None
            if error and kind is None:
                raise error
            if error:
                warn(str(error))

    def save(
        self,
        adapter: Adapter,
        state: bytes,
        cursor: Cursor,
        collection: Collection | None = None,
        line: str = "",
    ) -> None:
        """Have the bundle of `adapter` written, which an update on `collection` made, and a line of `metrics.jsonl`.

        Returns once the bundle before is written. Raises RloraError where none could be for too long.
        """
        in_time = self._wait()
        if collection:
            self._count(collection.sampled)
        bundle = Bundle(self.origin, adapter, state, cursor, self.config, None, self._parent, dict(self._rewards))
        groups = collection.groups if collection else None
        self._parent = adapter.digest
        self._unlogged += f"{line}\n".encode() if line else b""
        self._count_accuracy(line or "{}")
        if not in_time:
            raise self._put_elsewhere(self._with_episodes(bundle, groups))
        failing = time.monotonic() - self._failing_since if self._failing_since else 0.0
        self._unsaved = bundle
        self._start(partial(self._write, bundle, groups))
        if failing > self.config.checkpoint.patience and (not self._wait() or self._unsaved):
            raise self._put_elsewhere(self._unsaved or bundle)

    def _start(self, write: Callable[[], None]) -> None:
        def run() -> None:
            try:
                write()
            finally:
                self._idle.set()

        self._idle.clear()
        Thread(target=run, daemon=True).start()  # the process may end without it

    def _wait(self, ending: bool = False) -> bool:
        """Wait until nothing is being written, but for `checkpoint.patience` seconds at most; returns whether it is."""
        tenth = self.config.checkpoint.patience / 10
        for number in range(1, 11):
            with machine.undisturbed() if ending and number == 1 else nullcontext():
                if self._idle.wait(tenth):
                    return True
            warn(f"NOT SAVED: {self.run} has not taken what is being written to it for {number * tenth:.0f} s")
        return False

    def _count(self, sampled: Sequence[Group]) -> None:
        """What each version's episodes were worth: they may come in several steps."""
        for episode in (episode for group in sampled for episode in group.episodes):
            if episode.reward is not None:
                number = episode.version.number
                total, count = self._rewards.get(number, (0.0, 0))
                self._rewards[number] = total + episode.reward, count + 1

    def _count_accuracy(self, line: str) -> None:
        figures = json.loads(line)
        if (accuracy := figures.get(f"accuracy/{HELD_OUT}")) is not None:
            self._accuracies[figures["accuracy/version"]] = accuracy

    # --- on the thread ---

    def _write(self, bundle: Bundle, groups: Sequence[Group] | None = None) -> None:
        """First the lines: one that is there too early is cut when the run is resumed, one that is missing is lost."""
        start = time.perf_counter()
        try:
            self._unsaved = bundle = self._with_episodes(bundle, groups)
            self._log()
            files = bundle.files
            write_directory(bundle_path(self.run, bundle.version), files)
        except Exception as error:  # of whatever file system it is
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            left = max(0.0, self.config.checkpoint.patience - (now - self._failing_since))
            warn(
                f"NOT SAVED: version {bundle.version} could not be written to {self.run} ({error}); make room there, "
                f"or let it be written to. Each step tries again, for up to {left:.0f} s"
            )
            return
        if self._failing_since:
            warn(f"{self.run} takes bundles again: version {bundle.version} is saved")
        self._unsaved = self._failing_since = None
        self.saved = SaveStats(time.perf_counter() - start, sum(map(len, files.values())))
        with suppress(Exception):  # what is there can't be known now: then there is more than asked for
            self._retire(bundle.version)

    def _with_episodes(self, bundle: Bundle, groups: Sequence[Group] | None) -> Bundle:
        """The bundle with those of its update, as far as the config has them kept."""
        limit = self.config.checkpoint.episodes_mib
        if groups is None or not limit:
            return bundle
        update = episodes.encode(groups)
        if len(update) <= limit * 2**20:
            return replace(bundle, update=update)
        warn(
            f"checkpoint.episodes_mib = {limit}: the episodes of version {bundle.version} are not kept, they take "
            f"{len(update) / 2**20:.1f} MiB; raise it, or set it to 0 to keep none"
        )
        return bundle

    def _retire(self, newest: int) -> None:
        """Remove the bundles that the config does not ask to keep."""
        settings, there = self.config.checkpoint, [each for each in versions(self.run) if each <= newest]
        if self.config.learner.full_finetuning:  # each is a whole model and three times that
            settings = replace(settings, keep_last=min(2, settings.keep_last), keep_every=0, keep_best=0)
        means = {version: total / count for version, (total, count) in self._rewards.items()}
        worth = self._accuracies if settings.best_by == "accuracy" else means
        best = sorted(worth.keys() & set(there), key=lambda version: worth[version])
        kept = {*there[-settings.keep_last :], *(best[-settings.keep_best :] if settings.keep_best else ())}
        if settings.keep_every:
            kept |= {version for version in there if version % settings.keep_every == 0}
        for version in set(there) - kept:
            try:
                remove(bundle_path(self.run, version))
            except Exception as error:
                if version not in self._stuck:
                    warn(f"{bundle_path(self.run, version)} could not be removed ({error}); it stays")
                self._stuck.add(version)
        self._rewards = {version: of for version, of in self._rewards.items() if version in kept}

    def _keep_lines_before(self, step: int) -> int:
        """Drop the lines of `step` and later, and one cut off by a crash: they come again. Returns how long it is."""
        kept = "".join(f"{line}\n" for line in whole_lines(self.run) if json.loads(line)["step"] < step).encode()
        write_file(self.run / METRICS, kept)
        return len(kept)

    def _log(self) -> None:
        """Append the lines that are not written yet."""
        if not self._unlogged:
            return
        path = self.run / METRICS
        try:
            if not isinstance(path, Path):  # most of those know no appending
                write_file(path, path.read_bytes()[: self._logged] + self._unlogged)
            else:
                with path.open("r+b") as file:
                    file.truncate(self._logged)  # what a full disk took of a line
                    file.seek(self._logged)
                    file.write(self._unlogged)
                    file.flush()
                    os.fsync(file.fileno())
        except Exception as error:
            warn(f"NOT SAVED: {path} could not be written ({error}); its lines wait for the next step")
            return
        self._logged, self._unlogged = self._logged + len(self._unlogged), b""

    # --- where nothing is on the thread, or it hangs ---

    def _put_elsewhere(self, bundle: Bundle) -> RloraError:
        """Write a bundle that could not be written where there is room; returns the error that ends the run."""
        self._ended = True
        own, again = bundle_path(self.run, bundle.version), f"go on with `rlora train --resume {self.run}`"
        what, mend = f"--run-dir {self.run}: version {bundle.version} could not be written there", "make room"
        if not self._idle.is_set():
            what += f" in time (checkpoint.patience = {self.config.checkpoint.patience:g} s)"
            mend = "see that it answers"
        with machine.undisturbed():
            try:
                place = Path(tempfile.mkdtemp(prefix=f"rlora-{self.run.name}-")) / own.name
                write_directory(place, bundle.files)
                told = f"{what}. It is kept in {place}: {mend}, move it to {own}, then {again}"
                if self._unlogged:
                    write_file(place.with_name(METRICS), self._unlogged)
                    told += f". First append its last lines, {place.with_name(METRICS)}, to {self.run / METRICS}"
            except Exception as full:
                told = f"{what}, nor to a temporary directory ({full}); make room, then {again}"
        return RloraError(told)
