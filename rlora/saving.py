"""Writes a run's bundles and metrics while the next step goes on, whatever the disk does."""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from upath import UPath

from rlora import episodes
from rlora.checkpoint import Bundle, bundle_path, versions
from rlora.config import Config
from rlora.records import Adapter, Cursor, Group, RloraError
from rlora.runs import METRICS, Origin, warn
from rlora.storage import remove, write_directory, write_file


@dataclass(frozen=True)
class Saved:
    """What the last bundle that was written cost."""

    seconds: float  # on the thread that writes
    bytes: int


class Saver:
    """Keeps a run on a thread of its own: the loop waits for nothing but the bundle before.

    Where the disk does not take a bundle training goes on in memory, loudly, and each step tries again with the newest.
    After `checkpoint.patience` seconds, or at the end, that one is put where there is room, and RloraError says where.
    `start` is the bundle that the run goes on from.
    """

    def __init__(self, run: UPath, config: Config, origin: Origin, start: Bundle | None) -> None:
        self.run, self.config, self.origin = run, config, origin
        self.saved: Saved | None = None
        self._parent = start.adapter.digest if start else None
        self._rewards = dict(start.rewards) if start else {}
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._unsaved: Bundle | None = None  # the newest, where the disk did not take it
        self._failing_since = 0.0
        self._logged = self._keep_lines_before(start.version if start else 0)  # bytes
        self._unlogged = b""

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Have everything on the disk, or the newest bundle elsewhere."""
        self._thread.shutdown()
        if self._unsaved:
            self._write(self._unsaved)
        if self._unsaved:
            error = self._put_elsewhere(self._unsaved)
            if kind is None:
                raise error
            warn(str(error))

    def save(
        self,
        adapter: Adapter,
        state: bytes,
        cursor: Cursor,
        groups: Sequence[Group] = (),
        sampled: Sequence[Group] = (),
    ) -> None:
        """Have the bundle of `adapter` written, which an update on `groups` made, of all that were `sampled` for it.

        Returns once the bundle before is written. Raises RloraError where none could be for too long.
        """
        if self._writing:
            self._writing.result()
        if self._unsaved and time.monotonic() - self._failing_since > self.config.checkpoint.patience:
            raise self._put_elsewhere(self._unsaved)
        self._rewards |= _by_version(sampled)
        bundle = Bundle(self.origin, adapter, state, cursor, self.config, None, self._parent, dict(self._rewards))
        self._parent = adapter.digest
        self._writing = self._thread.submit(self._write_with, bundle, groups)

    def log(self, line: str) -> None:
        """Have a line added to `metrics.jsonl`."""
        self._thread.submit(self._add, line)

    # --- on the thread ---

    def _write_with(self, bundle: Bundle, groups: Sequence[Group]) -> None:
        limit = self.config.checkpoint.episodes_mib
        if groups and limit:
            update = episodes.encode(groups)
            if len(update) <= limit * 2**20:
                bundle = replace(bundle, update=update)
            else:
                warn(
                    f"checkpoint.episodes_mib = {limit}: the episodes of version {bundle.version} are not kept, they "
                    f"take {len(update) / 2**20:.1f} MiB; raise it, or set it to 0 to keep none"
                )
        self._write(bundle)

    def _write(self, bundle: Bundle) -> None:
        start = time.perf_counter()
        try:
            files = bundle.files
            write_directory(bundle_path(self.run, bundle.version), files)
        except Exception as error:  # of whatever file system it is
            now = time.monotonic()
            self._failing_since = self._failing_since if self._unsaved else now
            self._unsaved = bundle
            left = self.config.checkpoint.patience - (now - self._failing_since)
            warn(f"NOT SAVED: version {bundle.version} could not be written to {self.run} ({error}). Training goes on "
                 f"in memory for up to {max(0.0, left):.0f} s: make room there, or let it be written to")  # fmt: skip
            return
        if self._unsaved:
            warn(f"{self.run} takes bundles again: version {bundle.version} is saved")
        self._unsaved = None
        self.saved = Saved(time.perf_counter() - start, sum(map(len, files.values())))
        with suppress(OSError):  # then there is more than asked for
            self._retire()

    def _retire(self) -> None:
        """Remove the bundles that the config does not ask to keep."""
        settings, there = self.config.checkpoint, versions(self.run)
        if self.config.learner.whole:  # each is a whole model and three times that
            settings = replace(settings, keep_last=1, keep_every=0, keep_best=0)
        best = sorted(there, key=lambda version: self._rewards.get(version, float("-inf")))
        last, of_each = there[-settings.keep_last :], settings.keep_every
        kept = {*last, *(best[-settings.keep_best :] if settings.keep_best else ())}
        for version in there:
            if version not in kept and not (of_each and version % of_each == 0):
                remove(bundle_path(self.run, version))
                self._rewards.pop(version, None)

    def _put_elsewhere(self, bundle: Bundle) -> RloraError:
        """Write a bundle where there is room; returns the error that ends the run."""
        self._unsaved = None
        own = bundle_path(self.run, bundle.version)
        what = f"--run-dir {self.run}: version {bundle.version} could not be written there"
        again = f"go on with `rlora train --resume {self.run}`"
        try:
            place = Path(tempfile.mkdtemp(prefix=f"rlora-{self.run.name}-")) / own.name
            write_directory(place, bundle.files)
        except OSError as error:
            return RloraError(
                f"{what}, nor to a temporary directory ({error}); make room, then {again} from the one before"
            )
        return RloraError(f"{what}. It is kept in {place}: make room, move it to {own}, then {again}")

    def _keep_lines_before(self, step: int) -> int:
        """Drop the lines of `step` and later, and one cut off by a crash: they come again. Returns how long it is."""
        path = self.run / METRICS
        lines = path.read_text().splitlines() if path.exists() else []
        kept = "".join(f"{line}\n" for line in lines if line.endswith("}") and json.loads(line)["step"] < step).encode()
        write_file(path, kept)
        return len(kept)

    def _add(self, line: str) -> None:
        """Append a line, after any that could not be written before."""
        self._unlogged += line.encode() + b"\n"
        path = self.run / METRICS
        try:
            if not isinstance(path, Path):  # most of those know no appending
                write_file(path, path.read_bytes()[: self._logged] + self._unlogged)
            else:
                with path.open("r+b") as file:
                    file.truncate(self._logged)  # what a full disk took of a line
                    file.seek(self._logged)
                    file.write(self._unlogged)
        except Exception as error:
            warn(f"NOT SAVED: {path} could not be written ({error}); its lines wait for the next step")
            return
        self._logged, self._unlogged = self._logged + len(self._unlogged), b""


def _by_version(groups: Sequence[Group]) -> dict[int, float]:
    """The mean reward of the episodes that each version sampled."""
    rewards = defaultdict(list)
    for episode in (episode for group in groups for episode in group.episodes):
        if episode.reward is not None:
            rewards[episode.version].append(episode.reward)
    return {version: fmean(of) for version, of in rewards.items()}
