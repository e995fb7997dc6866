"""Resuming and forking: turns a bundle into the starting point of a run."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upath import UPath

from rlora.records import ADAPTER_FILES, Adapter
from rlora.rollout.cursor import Cursor
from rlora.run.checkpoint import Bundle, bundle_path, read
from rlora.run.directory import Provenance
from rlora.run.start import read as read_files
from rlora.settings import Config
from rlora.settings.fields import Tag, tagged
from rlora.store import names, write_directory

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from rlora.model.chat import Chat


def cursor_for(config: Config, bundle: Bundle, origin: Provenance) -> Cursor:
    """Return the cursor with which a run continues after `bundle`, under `config`.

    If the training prompts or a setting that affects episodes have changed, episodes in flight are dropped, with a
    warning. `origin` is the provenance of this process.
    """
    cursor = _with_policy(bundle.cursor, origin.run)
    if origin.prompts != bundle.origin.prompts:
        _log.warning(
            f"env = {config.env!r}: its training prompts have changed since version {bundle.version}; episodes in "
            f"flight are dropped, and the run continues with prompt {cursor.next} in the new order"
        )
        return Cursor(cursor.next)
    changed = [name for name in tagged(Config, Tag.EPISODES) if getattr(config, name) != getattr(bundle.config, name)]
    if changed and cursor.in_flight:
        _log.warning(f"{', '.join(changed)}: changed, so the prompts in flight are sampled again")
        return Cursor(cursor.next, (*(prompt.position for prompt in cursor.in_flight), *cursor.retries))
    return cursor


def _with_policy(cursor: Cursor, policy: str) -> Cursor:
    """Return a copy whose adapters in flight belong to `policy`, because the run's directory is possibly renamed."""
    in_flight = [
        replace(prompt, adapter=prompt.adapter and replace(prompt.adapter, policy=policy))
        for prompt in cursor.in_flight
    ]
    return replace(cursor, in_flight=tuple(in_flight))


def adopt(start: Bundle, run: UPath) -> Bundle:
    """Write `start`, a bundle of a different run, as the first bundle of `run`, and return the written bundle.

    `run` is the directory that `directory.create` made for the fork. The written bundle has the name and provenance of
    the fork. Blocks until this bundle is on disk. Raises OSError.
    """
    origin = replace(Provenance.of(run), prompts=start.origin.prompts)  # the cursor refers to the source's prompts
    adapter, cursor = replace(start.adapter, policy=run.name), _with_policy(start.cursor, run.name)
    bundle = replace(start, origin=origin, adapter=adapter, cursor=cursor)
    path = bundle_path(run, bundle.version)
    write_directory(path, bundle.files)
    return read(path)


def keep_start(run: UPath, config: Config) -> Config:
    """Copy the adapter in `learner.start_from` into a new run, because the original can be deleted later.

    Returns the config with the path of the copy. Raises RloraError if there is no adapter.
    """
    if not config.learner.start_from:
        return config
    saved = read_files(UPath(config.learner.start_from))
    write_directory(run / "start", dict(zip(ADAPTER_FILES, saved, strict=True)))
    return with_kept_start(run, config)


def with_kept_start(run: UPath, config: Config) -> Config:
    """Return the config with the path of the run's copy (`keep_start`) in `learner.start_from`, if there is a copy."""
    copy = run / "start"
    if not (config.learner.start_from and names(copy)):
        return config
    return replace(config, learner=replace(config.learner, start_from=str(copy.absolute())))


def with_template(config: Config, chat: "Chat") -> Config:
    """Return the config with the text of the chat template in place of a file's name, because the file can change."""
    if not (config.chat.template and chat.template and "{" in chat.template):  # "{" marks a text
        return config
    return replace(config, chat=replace(config.chat, template=chat.template))


def describe(run: UPath, adapter: Adapter) -> dict[str, Any]:
    """Return the figures of the last version for summary.json: steps, parameters, bytes, and the path of its bundle."""
    return {
        "steps": adapter.number,
        "adapter/parameters": adapter.parameters,
        "adapter/bytes": len(adapter.weights),
        "adapter/path": str(bundle_path(run, adapter.number)),
    }
