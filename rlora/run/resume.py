"""From a bundle to a run that goes on, its own or another that starts from it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upath import UPath

from rlora.records import ADAPTER_FILES, Adapter, Cursor
from rlora.run.checkpoint import Bundle, bundle_path, read
from rlora.run.directory import Provenance, warn
from rlora.run.start import read as read_files
from rlora.settings import Config
from rlora.store import names, write_directory

if TYPE_CHECKING:
    from rlora.model.chat import Chat

# what an episode depends on beside its adapter; where one of these changed, those in flight are not the config's
_OF_EPISODES = (
    "seed", "group_size", "dtype", "env", "env_args", "sampling", "chat", "reward", "reward_args", "reward_weights",
    "scoring",
)  # fmt: skip


def cursor_for(config: Config, bundle: Bundle, origin: Provenance) -> Cursor:
    """Where `bundle` goes on under `config`, with what it had in flight if that is still what the config asks for."""
    cursor = _of_policy(bundle.cursor, origin.run)
    if origin.prompts != bundle.origin.prompts:
        warn(
            f"env = {config.env!r}: its training prompts are others than they were at version {bundle.version}; what "
            f"was in flight is left out, and the run goes on with prompt {cursor.next} in their order"
        )
        return Cursor(cursor.next)
    changed = [name for name in _OF_EPISODES if getattr(config, name) != getattr(bundle.config, name)]
    if changed and cursor.in_flight:
        warn(f"{', '.join(changed)}: changed, so the prompts that were in flight are sampled again")
        return Cursor(cursor.next, (*(each.place for each in cursor.in_flight), *cursor.again))
    return cursor


def _of_policy(cursor: Cursor, policy: str) -> Cursor:
    """The cursor with adapters in flight known as that policy's: a run's directory may have been renamed."""
    in_flight = [
        replace(each, adapter=each.adapter and replace(each.adapter, policy=policy)) for each in cursor.in_flight
    ]
    return replace(cursor, in_flight=tuple(in_flight))


def adopt(start: Bundle, run: UPath) -> Bundle:
    """Make another run's bundle the first one of `run`, which `runs.create` made."""
    origin = replace(Provenance.of(run), prompts=start.origin.prompts)  # those of what was in flight
    adapter, cursor = replace(start.adapter, policy=run.name), _of_policy(start.cursor, run.name)
    bundle = replace(start, origin=origin, adapter=adapter, cursor=cursor)
    path = bundle_path(run, bundle.version)
    write_directory(path, bundle.files)
    return read(path)


def lineage(start: Bundle) -> dict[str, Any]:
    """What a fork says of where it comes from."""
    origin = start.origin
    return {"run": origin.run, "id": origin.id, "version": start.version, "digest": start.adapter.digest}


def keep_start(run: UPath, config: Config) -> Config:
    """Copy what `learner.start_from` names into a new run, for it may go; returns the config with the copy's path."""
    if not config.learner.start_from:
        return config
    saved = read_files(UPath(config.learner.start_from))
    write_directory(run / "start", dict(zip(ADAPTER_FILES, saved, strict=True)))
    return with_own_start(run, config)


def with_own_start(run: UPath, config: Config) -> Config:
    """The config of a run that has kept what it started from, with the copy's path."""
    own = run / "start"
    if not (config.learner.start_from and names(own)):
        return config
    return replace(config, learner=replace(config.learner, start_from=str(own.absolute())))


def with_template(config: Config, chat: "Chat") -> Config:
    """The config with the text of its chat template, for a file that it names may change, or go."""
    if not (config.chat.template and chat.template and "{" in chat.template):  # by that a text is known
        return config
    return replace(config, chat=replace(config.chat, template=chat.template))


def describe(run: UPath, adapter: Adapter) -> dict[str, Any]:
    """What a summary says of the last version."""
    return {
        "steps": adapter.number,
        "adapter/parameters": adapter.parameters,
        "adapter/bytes": len(adapter.weights),
        "adapter/path": str(bundle_path(run, adapter.number)),
    }
