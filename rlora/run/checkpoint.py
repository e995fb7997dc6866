"""The bundle of a step: all that a run goes on from, can be forked from, and is proven by.

`<run>/bundles/<version>/` holds the version in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`), what
the learner goes on from (`state.safetensors`), the episodes of the update that made it (`update.parquet`), what was
sampled and not yet learned from (`in_flight.parquet`), the adapters that prompts in flight are sampled under, and
`bundle.json`: the rest of what there is to know, the digest of each file, and its own.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from upath import UPath

from rlora.config import validate
from rlora.records import ADAPTER_FILES, WHOLE_FILES, Adapter, Cursor, Group, InFlight, RloraError
from rlora.run import episodes
from rlora.run.directory import METRICS, Provenance, warn, whole_lines
from rlora.settings import Config
from rlora.store import names, read_file

BUNDLES = "bundles"  # the directory of a run's
_MANIFEST = "bundle.json"
_STATE, _UPDATE, _IN_FLIGHT = "state.safetensors", "update.parquet", "in_flight.parquet"
_FORMAT = 1


Rewards = tuple[float, int]  # their sum, and how many


class BundleError(RloraError):
    """A bundle that is damaged, or another run's."""


@dataclass(frozen=True)
class Bundle:
    """What a run is after an update."""

    origin: Provenance
    adapter: Adapter
    state: bytes  # `Learner.state`
    cursor: Cursor
    config: Config
    update: bytes | None = None  # the groups that the update learned from, as Parquet; None where they are not kept
    parent: str | None = None  # digest of the version before
    rewards: Mapping[int, Rewards] = field(default_factory=dict)  # of the episodes that each version kept has sampled

    @property
    def version(self) -> int:
        return self.adapter.number

    @cached_property
    def groups(self) -> list[Group] | None:
        """Those that the update learned from; None where they were not kept."""
        return None if self.update is None else episodes.decode(self.update, self.adapter.policy)

    @property
    def files(self) -> dict[str, bytes]:
        """By name; the last one tells that all are there."""
        sent = self.cursor.in_flight
        played = [each.group for each in sent if each.group]
        adapters = {each.adapter.number: each.adapter for each in sent if each.adapter}
        files = {
            **self.adapter.files,
            _STATE: self.state,
            **({} if self.update is None else {_UPDATE: self.update}),
            **({_IN_FLIGHT: episodes.encode(played)} if played else {}),
            **{_pinned(version): adapter.weights for version, adapter in adapters.items() if not adapter.full_weights},
        }
        number = iter(range(len(played)))
        manifest = {
            "format": _FORMAT,
            "origin": asdict(self.origin),
            "version": self.version,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "digest": self.adapter.digest,
            "parent": self.parent,
            "versions": {version: adapter.digest for version, adapter in adapters.items()},
            "rewards": self.rewards,
            "cursor": {
                "next": self.cursor.next,
                "again": self.cursor.again,
                "in_flight": [
                    {
                        "place": each.place,
                        "step": each.step,
                        "version": each.adapter.number if each.adapter else None,
                        "group": next(number) if each.group else None,
                        "scored": each.scored,
                    }
                    for each in sent
                ],
            },
            "config": asdict(self.config),
            "files": {name: {"bytes": len(content), "sha256": _digest(content)} for name, content in files.items()},
        }
        plain = json.loads(json.dumps(manifest))  # as it will be read
        return files | {_MANIFEST: json.dumps({"sha256": _digest(_canonical(plain))} | plain, indent=1).encode()}


def _pinned(version: int) -> str:
    return f"in_flight-{version}.safetensors"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


# --- reading ---


def bundle_path(run: UPath, version: int) -> UPath:
    return run / BUNDLES / str(version)


def versions(run: UPath) -> list[int]:
    """Those that have a bundle, whole or not, the newest last. Raises OSError where that can't be known now."""
    return sorted(int(name) for name in names(run / BUNDLES) if name.isdigit())


def read(path: UPath) -> Bundle:
    """The bundle in a directory. Raises BundleError, which says what is wrong, unless every byte is as written."""
    manifest = _read_manifest(path)
    contents = {name: _read_whole(path / name, expected) for name, expected in manifest["files"].items()}
    origin, version = Provenance(**manifest["origin"]), manifest["version"]
    whole = WHOLE_FILES[0] in contents
    kind, weights = (contents[name] for name in (WHOLE_FILES if whole else ADAPTER_FILES))
    adapter = Adapter(origin.run, version, kind, weights, whole)
    played = episodes.decode(contents[_IN_FLIGHT], origin.run) if _IN_FLIGHT in contents else []
    adapters = {
        pinned: replace(adapter, number=pinned, weights=contents[_pinned(pinned)])
        for pinned in map(int, manifest["versions"])
        if _pinned(pinned) in contents
    }
    cursor = manifest["cursor"]
    in_flight = []
    for each in cursor["in_flight"]:
        pinned, number = adapters.get(each["version"]), each["group"]
        if pinned or each["version"] is None:
            group = None if number is None else played[number]
            in_flight.append(InFlight(each["place"], each["step"], pinned, group, each["scored"]))
        else:  # all weights: the version that it was sampled under is not kept
            in_flight.append(InFlight(each["place"], each["step"]))
    return Bundle(
        origin,
        adapter,
        contents[_STATE],
        Cursor(cursor["next"], tuple(cursor["again"]), tuple(in_flight)),
        _config_of(manifest, path),
        contents.get(_UPDATE),
        manifest["parent"],
        {int(version): (total, count) for version, (total, count) in manifest["rewards"].items()},
    )


def _read_manifest(path: UPath) -> dict[str, Any]:
    """It, and that it is itself. Raises BundleError."""
    try:
        manifest: dict[str, Any] = json.loads(_read_file(path / _MANIFEST))
        signature = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        raise BundleError(f"{path}/{_MANIFEST}: it is damaged: not the JSON object that it was") from None
    if signature != _digest(_canonical(manifest)):
        raise BundleError(f"{path}/{_MANIFEST}: it is damaged: its digest is another than it says")
    if manifest["format"] != _FORMAT:
        raise RloraError(
            f"{path}/{_MANIFEST}: format = {manifest['format']}; this release of rlora reads {_FORMAT}, use the one "
            "that wrote it"
        )
    return manifest


def _read_whole(path: UPath, expected: Mapping[str, Any]) -> bytes:
    content = _read_file(path)
    if len(content) != expected["bytes"]:
        raise BundleError(f"{path}: it is damaged: it has {len(content):,} bytes, not {expected['bytes']:,}")
    if _digest(content) != expected["sha256"]:
        raise BundleError(f"{path}: it is damaged: its digest is not the one in {_MANIFEST}")
    return content


def _read_file(path: UPath) -> bytes:
    """Raises BundleError where it is not there. What may be there another time is no reason to pass a bundle over."""
    try:
        content = read_file(path)
    except OSError as error:
        raise RloraError(f"{path}: it can't be read ({error}); try again, or move its bundle away") from error
    if content is None:
        raise BundleError(f"{path}: it is not there, so the bundle is not whole")
    return content


def newest(run: UPath, origin: Provenance) -> Bundle | None:
    """The newest whole bundle of the run, None where there is none at all yet.

    What is damaged, or of another run, is told of and passed over. Raises RloraError where nothing else is left, or
    where steps were done and their bundles are gone.
    """
    found = versions(run)
    for version in reversed(found):
        path = bundle_path(run, version)
        try:
            return _of(origin, path, version)
        except BundleError as error:
            warn(f"{error}\n{path} is passed over; the newest one before it is taken")
    if found:
        raise RloraError(
            f"{run}: none of its {len(found)} bundles is whole, and there is nothing to go on from; bring back a copy "
            "of one, or start a new run"
        )
    if lines := whole_lines(run):
        raise RloraError(
            f"{run}: {METRICS} tells of {len(lines)} steps, but there is no bundle to go on from; bring back a copy of "
            "one, or start a new run"
        )
    return None


def _of(origin: Provenance, path: UPath, version: int) -> Bundle:
    """The bundle at `path`. Raises BundleError where it is another run's or another version's."""
    bundle = read(path)
    if bundle.origin.id != origin.id:
        raise BundleError(
            f"{path}: it is of another run, {bundle.origin.run} ({bundle.origin.id}), not of this one ({origin.id}); "
            "`rlora train --fork` starts a run from it"
        )
    if bundle.version != version:
        raise BundleError(f"{path}: it is the bundle of version {bundle.version}, under another's name")
    return bundle


def read_version(run: UPath, version: int | None = None) -> Bundle:
    """A version of a run, the newest whole one by default. Raises RloraError that says which ones there are."""
    if version is not None:
        path = _there(run, version)
        return _of(Provenance.of(run), path, version)
    _kept(run)
    bundle = newest(run, Provenance.of(run))
    assert bundle
    return bundle


def read_config(run: UPath, version: int) -> Config:
    """That which a version was made under. Raises RloraError like `read_version`."""
    return _config_of(_read_manifest(path := _there(run, version)), path)


def _there(run: UPath, version: int) -> UPath:
    """Where the bundle of a version is. Raises RloraError, which says which ones are kept, where that one is not."""
    there = _kept(run)
    if version not in there:
        raise RloraError(
            f"{run}: it keeps no bundle of version {version}; there are {_ranges(there)} (config: "
            "checkpoint.keep_last, keep_every and keep_best)"
        )
    return bundle_path(run, version)


def _kept(run: UPath) -> list[int]:
    """The versions of which there are bundles. Raises RloraError where there is none."""
    if there := versions(run):
        return there
    raise RloraError(f"{run}: it has no bundle yet; `rlora train --resume {run}` begins it again")


def _config_of(manifest: Mapping[str, Any], path: UPath) -> Config:
    return validate(manifest["config"], f"{path}/{_MANIFEST}, written by another release of rlora? config: ")


def _ranges(numbers: Sequence[int]) -> str:
    """1, 3 to 5, 9"""
    starts = [each for each in numbers if each - 1 not in numbers]
    ends = [each for each in numbers if each + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))
