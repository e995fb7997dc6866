"""Checkpoint bundles: everything that a run needs to resume, to be forked and to be replayed.

    <run>/bundles/<version>/
      adapter_config.json          --+  the version in PEFT's format
      adapter_model.safetensors      |    (all weights: config.json and model.safetensors)
      state.safetensors              |  the learner: fp32 master weights, Adam's moments, random generators
      update.parquet                 |  episodes of the update that made the version
      in_flight.parquet              |  groups that were sampled and not yet trained on
      in_flight-<v>.safetensors    --+  adapters that prompts in flight are sampled under
                                     |  length and SHA-256 of each file
                                     v
      bundle.json   <- written last     these digests, its own digest, provenance, cursor, config

    write   .<version>.half/, every file fsynced  --rename-->  <version>/, parent directory fsynced
            (at a URL, which has no atomic rename: bundle.json last, so an incomplete bundle has none)
    read    bundle.json matches its own digest -> every file matches bundle.json -> run id and version match
            otherwise BundleError, and `newest` tries the previous bundle

`update.parquet` is absent if it exceeds `checkpoint.episodes_mib`, the in-flight files if no prompt is in flight.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from upath import UPath

from rlora.config import validate
from rlora.records import ADAPTER_FILES, MODEL_FILES, Adapter, Group, RloraError
from rlora.rollout.cursor import Cursor, InFlight
from rlora.run import episodes
from rlora.run.directory import METRICS, Provenance, complete_lines
from rlora.settings import Config
from rlora.store import names, read_file

_log = logging.getLogger(__name__)

BUNDLES = "bundles"  # directory within a run's directory
_MANIFEST = "bundle.json"
_STATE, _UPDATE, _IN_FLIGHT = "state.safetensors", "update.parquet", "in_flight.parquet"
_FORMAT = 1
_RESTORE = "restore a copy of the bundle, or use a different version"


Rewards = tuple[float, int]  # sum of rewards, and number of episodes


class BundleError(RloraError):
    """A bundle is damaged or belongs to a different run."""


@dataclass(frozen=True)
class Bundle:
    """A checkpoint: everything that a run needs to continue after an update, as `read` returns it."""

    origin: Provenance
    adapter: Adapter
    state: bytes  # `Learner.state`
    cursor: Cursor
    config: Config
    update: bytes | None = None  # the groups that the update trained on, as Parquet; None if not stored
    parent: str | None = None  # digest of the previous version
    rewards: Mapping[int, Rewards] = field(default_factory=dict)  # of each stored version's episodes, by version number

    @property
    def version(self) -> int:
        """Number of the version."""
        return self.adapter.number

    @property
    def identity(self) -> dict[str, Any]:
        """The run, its id, and the version and digest, for the provenance of runs that start from this bundle."""
        return _identity(self.origin, self.version, self.adapter.digest)

    @cached_property
    def groups(self) -> list[Group] | None:
        """The groups that the update trained on; None if they are not stored."""
        return None if self.update is None else episodes.decode(self.update, self.adapter.policy)

    @property
    def files(self) -> dict[str, bytes]:
        """Content of each file, by name. bundle.json comes last: a directory without bundle.json is not a bundle."""
        sent = self.cursor.in_flight
        played = [prompt.group for prompt in sent if prompt.group]
        adapters = {prompt.adapter.number: prompt.adapter for prompt in sent if prompt.adapter}
        files = {
            **self.adapter.files,
            _STATE: self.state,
            **({} if self.update is None else {_UPDATE: self.update}),
            **({_IN_FLIGHT: episodes.encode(played)} if played else {}),
            **{_pinned(version): adapter.weights for version, adapter in adapters.items() if not adapter.full_weights},
        }
        group_index = iter(range(len(played)))
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
                "again": self.cursor.retries,
                "in_flight": [
                    {
                        "place": prompt.position,
                        "step": prompt.step,
                        "version": prompt.adapter.number if prompt.adapter else None,
                        "group": next(group_index) if prompt.group else None,
                        "scored": prompt.scored,
                    }
                    for prompt in sent
                ],
            },
            "config": asdict(self.config),
            "files": {name: {"bytes": len(content), "sha256": _digest(content)} for name, content in files.items()},
        }
        plain = json.loads(json.dumps(manifest))  # as `read` will parse it
        return files | {_MANIFEST: json.dumps({"sha256": _digest(_canonical(plain))} | plain, indent=1).encode()}


def _identity(origin: Provenance, version: int, digest: str) -> dict[str, Any]:
    return {"run": origin.run, "id": origin.id, "version": version, "digest": digest}


def _pinned(version: int) -> str:
    return f"in_flight-{version}.safetensors"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


# --- reading ---


def bundle_path(run: UPath, version: int) -> UPath:
    """Return the directory of a version's bundle, which need not exist."""
    return run / BUNDLES / str(version)


def versions(run: UPath) -> list[int]:
    """Return the versions that have a bundle, intact or not, in ascending order. Raises OSError if the store fails."""
    return sorted(int(name) for name in names(run / BUNDLES) if name.isdigit())


def read(path: UPath) -> Bundle:
    """Read and verify the bundle in the directory `path`.

    Raises BundleError if any byte differs from what was written, and RloraError if a file can't be read now or has the
    format of a different release.
    """
    manifest = _read_manifest(path)
    contents = {name: _read_verified(path / name, expected) for name, expected in manifest["files"].items()}
    origin = Provenance(**manifest["origin"])
    adapter = _adapter_of(manifest, contents)
    played = episodes.decode(contents[_IN_FLIGHT], origin.run) if _IN_FLIGHT in contents else []
    adapters = {
        pinned: replace(adapter, number=pinned, weights=contents[_pinned(pinned)])
        for pinned in map(int, manifest["versions"])
        if _pinned(pinned) in contents
    }
    cursor = manifest["cursor"]
    in_flight = []
    for entry in cursor["in_flight"]:
        pinned, group_index = adapters.get(entry["version"]), entry["group"]
        if pinned or entry["version"] is None:
            group = None if group_index is None else played[group_index]
            in_flight.append(InFlight(entry["place"], entry["step"], pinned, group, entry["scored"]))
        else:  # all weights: the version that the prompt was sampled under is not stored
            in_flight.append(InFlight(entry["place"], entry["step"]))
    return Bundle(
        origin,
        adapter,
        contents[_STATE],
        Cursor(cursor["next"], tuple(cursor["again"]), tuple(in_flight)),
        _validated_config(manifest, path),
        contents.get(_UPDATE),
        manifest["parent"],
        {int(version): (total, count) for version, (total, count) in manifest["rewards"].items()},
    )


def _adapter_files(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    return MODEL_FILES if MODEL_FILES[0] in manifest["files"] else ADAPTER_FILES


def _adapter_of(manifest: Mapping[str, Any], contents: Mapping[str, bytes]) -> Adapter:
    names = _adapter_files(manifest)
    config, weights = (contents[name] for name in names)
    return Adapter(manifest["origin"]["run"], manifest["version"], config, weights, names == MODEL_FILES)


def _read_manifest(path: UPath) -> dict[str, Any]:
    """Read the manifest and verify its digest. Raises BundleError, or RloraError for an unknown format."""
    try:
        manifest: dict[str, Any] = json.loads(_read_file(path / _MANIFEST))
        signature = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        raise BundleError(f"{path}/{_MANIFEST}: damaged: not the JSON object that was written; {_RESTORE}") from None
    if signature != _digest(_canonical(manifest)):
        raise BundleError(f"{path}/{_MANIFEST}: damaged: its digest does not match its content; {_RESTORE}")
    if manifest["format"] != _FORMAT:
        raise RloraError(
            f"{path}/{_MANIFEST}: format = {manifest['format']}; this release of rlora reads format {_FORMAT}; use the "
            "release that wrote the bundle"
        )
    return manifest


def _read_verified(path: UPath, expected: Mapping[str, Any]) -> bytes:
    content = _read_file(path)
    if len(content) != expected["bytes"]:
        raise BundleError(f"{path}: damaged: {len(content):,} bytes, expected {expected['bytes']:,}; {_RESTORE}")
    if _digest(content) != expected["sha256"]:
        raise BundleError(f"{path}: damaged: its digest does not match {_MANIFEST}; {_RESTORE}")
    return content


def _read_file(path: UPath) -> bytes:
    """Read a file. Raises BundleError if the file is missing, and RloraError if reading fails for another reason."""
    try:
        content = read_file(path)
    except OSError as error:
        raise RloraError(
            f"{path}: can't be read ({error}); try again, or move {path.parent} away to use an earlier version"
        ) from error
    if content is None:
        raise BundleError(f"{path}: missing, so the bundle is incomplete; {_RESTORE}")
    return content


def newest(run: UPath, origin: Provenance) -> Bundle | None:
    """Return the newest intact bundle of the run, or None if the run has neither bundles nor steps.

    `origin` is the run's provenance. Damaged bundles and those of other runs are skipped with a warning. Raises
    RloraError if no bundle is left, or if metrics.jsonl has steps and there is no bundle.
    """
    existing = versions(run)
    for version in reversed(existing):
        path = bundle_path(run, version)
        try:
            return _read_matching(path, origin, version)
        except BundleError as error:
            _log.warning(f"{error}\n{path} is skipped; the newest intact bundle of an earlier version is used")
    if existing:
        raise RloraError(
            f"{run}: none of its {len(existing)} bundles is intact, so the run can't be resumed; restore a copy of a "
            "bundle, or start a new run"
        )
    if lines := complete_lines(run):
        raise RloraError(
            f"{run}: {METRICS} has {len(lines)} steps, but there is no bundle to resume from; restore a copy of a "
            "bundle, or start a new run"
        )
    return None


def _read_matching(path: UPath, origin: Provenance, version: int) -> Bundle:
    """Read the bundle at `path`. Raises BundleError if the bundle belongs to a different run or version."""
    bundle = read(path)
    _check_matching(path, bundle.origin, bundle.version, origin, version)
    return bundle


def _check_matching(path: UPath, found: Provenance, number: int, origin: Provenance, version: int) -> None:
    """Raise BundleError if the bundle at `path`, of run `found` and version `number`, is not the expected one."""
    if found.id != origin.id:
        raise BundleError(
            f"{path}: the bundle belongs to a different run, {found.run} ({found.id}), not to this run "
            f"({origin.id}); move the bundle to that run's directory, from which `rlora train --fork` starts a new run"
        )
    if number != version:
        raise BundleError(
            f"{path}: contains version {number}, so its directory has the wrong name; rename the directory to {number}"
        )


def read_version(run: UPath, version: int | None = None) -> Bundle:
    """Read the bundle of a version of a run, by default the newest intact bundle.

    Raises RloraError if there is no such bundle, in a message that lists the existing versions.
    """
    if version is not None:
        path = _existing_path(run, version)
        return _read_matching(path, Provenance.of(run), version)
    _existing_versions(run)
    bundle = newest(run, Provenance.of(run))
    assert bundle
    return bundle


def identity(directory: UPath) -> dict[str, Any] | None:
    """Return `Bundle.identity` of the bundle in a directory; None if the directory has no intact manifest."""
    try:
        manifest = _read_manifest(directory)
    except RloraError:
        return None
    return _identity(Provenance(**manifest["origin"]), manifest["version"], manifest["digest"])


def read_adapter(run: UPath, version: int) -> Adapter:
    """Read and verify the adapter of a version, without the rest of its bundle. Raises as `read_version` does."""
    manifest = _read_manifest(path := _existing_path(run, version))
    _check_matching(path, Provenance(**manifest["origin"]), manifest["version"], Provenance.of(run), version)
    files = {name: _read_verified(path / name, manifest["files"][name]) for name in _adapter_files(manifest)}
    return _adapter_of(manifest, files)


def read_update(run: UPath, version: int) -> bytes | None:
    """Read and verify the episodes of the update that made a version, as Parquet; None if they are not stored.

    Raises as `read` does.
    """
    path = bundle_path(run, version)
    expected = _read_manifest(path)["files"].get(_UPDATE)
    return _read_verified(path / _UPDATE, expected) if expected else None


def adapters(run: UPath, newest: Adapter) -> list[Adapter]:
    """Return `newest`, the current version of a run, after the version before it if that has an intact bundle."""
    if newest.full_weights or newest.number - 1 not in versions(run):
        return [newest]
    try:
        return [read_adapter(run, newest.number - 1), newest]
    except (RloraError, OSError):
        return [newest]


def read_config(run: UPath, version: int) -> Config:
    """Read the config that a version was trained under. Raises RloraError as `read_version` does."""
    return _validated_config(_read_manifest(path := _existing_path(run, version)), path)


def _existing_path(run: UPath, version: int) -> UPath:
    """Return the directory of a version's bundle. Raises RloraError as `read_version` does."""
    existing = _existing_versions(run)
    if version not in existing:
        raise RloraError(
            f"{run}: there is no bundle of version {version}; use one of the versions {_ranges(existing)} "
            "(checkpoint.keep_last, checkpoint.keep_every and checkpoint.keep_best decide which bundles are kept)"
        )
    return bundle_path(run, version)


def _existing_versions(run: UPath) -> list[int]:
    """Return the versions that have a bundle. Raises RloraError if there are none."""
    if existing := versions(run):
        return existing
    raise RloraError(f"{run}: there is no bundle yet; `rlora train --resume {run}` starts the run again")


def _validated_config(manifest: Mapping[str, Any], path: UPath) -> Config:
    """Return the config in a manifest. Raises RloraError if a different release wrote a config that is invalid here."""
    source = f"{path}/{_MANIFEST}: a different release of rlora wrote this config; use that release: "
    return validate(manifest["config"], source)


def _ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers as "1, 3 to 5, 9"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))
