"""Background writer of a run's bundles and metrics, which tolerates a full or slow disk."""

import json
import logging
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
from rlora.records import Adapter, Group, RloraError, SaveStats
from rlora.rollout.cursor import Cursor
from rlora.rollout.stream import Collection
from rlora.run import episodes
from rlora.run.checkpoint import BUNDLES, Bundle, Rewards, bundle_path, versions
from rlora.run.directory import METRICS, WEIGHTS, Provenance, complete_lines
from rlora.run.line_log import LineLog
from rlora.settings import Config
from rlora.store import remove, remove_halves, write_directory, write_file
from rlora.telemetry.metrics import evaluated

_log = logging.getLogger(__name__)

_Update = tuple[Sequence[Group], episodes.Training]  # the groups of an update, and what it computed for their tokens


class CheckpointWriter:
    """Writes the bundles and metrics of a run in the background, within the context.

    `save` blocks only while the previous bundle is still being written. If a write fails, training continues with a
    warning, and each step retries with the newest bundle. If writes keep failing for `checkpoint.patience` seconds, if
    a write takes that long, or if the last write fails, the newest bundle is saved to a temporary directory, which the
    raised RloraError names. `origin` is the provenance of new bundles, `start` the bundle that the run resumes from.
    Only one thread writes at a time. While `_idle` is cleared, only this thread changes attributes.
    """

    def __init__(self, run: UPath, config: Config, origin: Provenance, start: Bundle | None) -> None:
        self.run, self.config, self.origin = run, config, origin
        self.saved: SaveStats | None = None
        self._parent = start.adapter.digest if start else None
        self._rewards: dict[int, Rewards] = dict(start.rewards) if start else {}
        self._idle = Event()  # set: no write is running; cleared: only the writing thread changes attributes
        self._idle.set()
        self._unsaved: Bundle | None = None  # the newest bundle, until it is written
        self._failing_since: float | None = None
        self._unremovable: set[int] = set()  # versions whose bundles can't be removed
        remove_halves(run / BUNDLES)
        step = start.version if start else 0
        self._metrics, self._weights = (LineLog(run / name, step) for name in (METRICS, WEIGHTS))
        self._accuracies: dict[int, float] = {}  # on the held-out prompts or examples, by evaluated version
        for line in complete_lines(run):
            self._count_accuracy(line)
        self._ended = False

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for all writes. If they fail, save the newest bundle to a temporary directory, and raise RloraError.

        If the context has raised an exception, that RloraError is logged instead. Ctrl-C has an effect only after the
        first warning about a disk that does not respond, and ends the wait.
        """
        if self._ended:
            return
        try:
            if self._wait(ending=True) and (self._unsaved or self._metrics.pending or self._weights.pending):
                self._start(partial(self._write, self._unsaved) if self._unsaved else self._write_lines)
                self._wait(ending=True)
        finally:
            unsaved = self._unsaved  # read once: a write that completes now clears it
            error = self._save_elsewhere(unsaved) if unsaved else None
            if error and kind is None:
                raise error
            if error:
                _log.warning(str(error))

    def save(
        self,
        adapter: Adapter,
        state: bytes,
        cursor: Cursor,
        collection: Collection | None = None,
        line: str = "",
        weights: str = "",
        trained: episodes.Training | None = None,
    ) -> None:
        """Start writing the bundle of `adapter`, which an update on `collection` made, and appending `line` to
        metrics.jsonl and `weights` to weights.jsonl. Blocks until the previous bundle is written.

        `state` is `Learner.state` after the update, `cursor` the position in the prompts, `trained` what the update
        computed for the collection's tokens. Raises RloraError if writes have failed for `checkpoint.patience` seconds,
        or if a write takes that long.
        """
        in_time = self._wait()
        if collection:
            self._count(collection.sampled)
        bundle = Bundle(self.origin, adapter, state, cursor, self.config, None, self._parent, dict(self._rewards))
        groups = (collection.groups, trained or {}) if collection else None
        self._parent = adapter.digest
        self._metrics.add(line)
        self._weights.add(weights)
        self._count_accuracy(line or "{}")
        if not in_time:
            raise self._save_elsewhere(self._with_episodes(bundle, groups))
        failing = time.monotonic() - self._failing_since if self._failing_since else 0.0
        self._unsaved = bundle
        self._start(partial(self._write, bundle, groups))
        if failing > self.config.checkpoint.patience and (not self._wait() or self._unsaved):
            raise self._save_elsewhere(self._unsaved or bundle)

    def _start(self, write: Callable[[], None]) -> None:
        def run() -> None:
            try:
                write()
            finally:
                self._idle.set()

        self._idle.clear()
        Thread(target=run, daemon=True).start()  # a daemon, because a write must not keep the process alive

    def _wait(self, ending: bool = False) -> bool:
        """Wait for the running write, at most `checkpoint.patience` seconds. Returns whether the write completed."""
        interval = self.config.checkpoint.patience / 10
        for number in range(1, 11):
            with machine.undisturbed() if ending and number == 1 else nullcontext():
                if self._idle.wait(interval):
                    return True
            _log.warning(
                f"NOT SAVED: a write to {self.run} has not completed for {number * interval:.0f} s; check that "
                "the disk responds"
            )
        return False

    def _count(self, sampled: Sequence[Group]) -> None:
        """Add rewards to the sums of their versions, because the episodes of a version can arrive in several steps."""
        for episode in (episode for group in sampled for episode in group.episodes):
            if episode.reward is not None:
                number = episode.version.number
                total, count = self._rewards.get(number, (0.0, 0))
                self._rewards[number] = total + episode.reward, count + 1

    def _count_accuracy(self, line: str) -> None:
        """Record the result of an evaluation on held-out prompts or examples: the accuracy, or of SFT -nll."""
        figures = json.loads(line)
        if result := evaluated(figures):
            name, value = result
            version = figures.get("accuracy/version", figures.get("held_out/version"))
            self._accuracies[version] = -value if name == "held_out/nll" else value

    # --- on the writing thread ---

    def _write(self, bundle: Bundle, groups: _Update | None = None) -> None:
        """Write the pending lines of metrics.jsonl, then the bundle: a resume removes lines without a bundle, but can't
        recover missing lines."""
        start = time.perf_counter()
        try:
            self._unsaved = bundle = self._with_episodes(bundle, groups)
            self._write_lines()
            files = bundle.files
            write_directory(bundle_path(self.run, bundle.version), files)
        except Exception as error:  # any file system of fsspec
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            remaining = max(0.0, self.config.checkpoint.patience - (now - self._failing_since))
            _log.warning(
                f"NOT SAVED: version {bundle.version} could not be written to {self.run} ({error}); free disk space "
                f"or make the directory writable. Each step retries, for up to {remaining:.0f} s"
            )
            return
        if self._failing_since:
            _log.warning(f"{self.run} is writable again: version {bundle.version} is saved")
        self._unsaved = self._failing_since = None
        self.saved = SaveStats(time.perf_counter() - start, sum(map(len, files.values())))
        with suppress(Exception):  # if the store fails, more bundles than configured are kept for now
            self._remove_old(bundle.version)

    def _write_lines(self) -> None:
        for log in (self._metrics, self._weights):
            log.write()

    def _with_episodes(self, bundle: Bundle, groups: _Update | None) -> Bundle:
        """Return the bundle with the episodes of its update, if their size is at most `checkpoint.episodes_mib`."""
        limit = self.config.checkpoint.episodes_mib
        if groups is None or not limit:
            return bundle
        for trained in (groups[1], None):  # without what the update computed, they may still fit
            update = episodes.encode(groups[0], trained)
            if len(update) <= limit * 2**20:
                return replace(bundle, update=update)
        _log.warning(
            f"checkpoint.episodes_mib = {limit}: the episodes of version {bundle.version} are not stored, because "
            f"they take {len(update) / 2**20:.1f} MiB; raise checkpoint.episodes_mib, or set it to 0 to store none"
        )
        return bundle

    def _remove_old(self, newest: int) -> None:
        """Remove bundles that `checkpoint.keep_last`, `checkpoint.keep_every` or `checkpoint.keep_best` does not keep.
        Versions above `newest` are not touched."""
        settings, existing = self.config.checkpoint, [version for version in versions(self.run) if version <= newest]
        if self.config.learner.full_finetuning:  # a bundle takes four times the model's size
            settings = replace(settings, keep_last=min(2, settings.keep_last), keep_every=0, keep_best=0)
        means = {version: total / count for version, (total, count) in self._rewards.items()}
        scores = self._accuracies if settings.best_by == "accuracy" or self.config.algorithm.supervised else means
        best = sorted(scores.keys() & set(existing), key=lambda version: scores[version])
        kept = {*existing[-settings.keep_last :], *(best[-settings.keep_best :] if settings.keep_best else ())}
        if settings.keep_every:
            kept |= {version for version in existing if version % settings.keep_every == 0}
        for version in set(existing) - kept:
            try:
                remove(bundle_path(self.run, version))
            except Exception as error:
                if version not in self._unremovable:
                    _log.warning(f"{bundle_path(self.run, version)} could not be removed ({error}); remove it by hand")
                self._unremovable.add(version)
        self._rewards = {version: rewards for version, rewards in self._rewards.items() if version in kept}

    # --- with no write running, or one that hangs ---

    def _save_elsewhere(self, bundle: Bundle) -> RloraError:
        """Write the bundle to a temporary directory, and return the error that ends the run."""
        self._ended = True
        destination, command = bundle_path(self.run, bundle.version), f"run `rlora train --resume {self.run}`"
        failure, fix = f"--run-dir {self.run}: version {bundle.version} could not be written there", "free disk space"
        if not self._idle.is_set():
            failure += f" in time (checkpoint.patience = {self.config.checkpoint.patience:g} s)"
            fix = "make sure that the disk responds"
        with machine.undisturbed():
            try:
                copy = Path(tempfile.mkdtemp(prefix=f"rlora-{self.run.name}-")) / destination.name
                write_directory(copy, bundle.files)
                message = f"{failure}. It was saved to {copy}: {fix}, move the copy to {destination}, then {command}"
                for log in (self._metrics, self._weights):
                    if log.pending:
                        lines = copy.with_name(log.path.name)
                        write_file(lines, log.pending)
                        message += f". First append its last lines, {lines}, to {log.path}"
            except Exception as error:
                message = f"{failure}, nor to a temporary directory ({error}); free disk space, then {command}"
        return RloraError(message)
