"""`rlora replay`: recompute the updates of a run."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rlora.cli.arguments import Replay
from rlora.cli.overrides import parse_source, with_changes
from rlora.config import check_same_policy, differences
from rlora.records import RloraError
from rlora.run.source import read_run, split

if TYPE_CHECKING:
    from rlora.run.replay import Replayed

# torch, transformers and Ray take seconds to import, so they are imported after the command line is parsed


def replay_command(arguments: list[str]) -> None:
    """Recompute updates, and print whether each is equal bit for bit. Raises RloraError if one is not."""
    options = parse_source(Replay, "rlora replay", arguments)
    from itertools import groupby

    from rlora import cluster
    from rlora.core.setup import Setup
    from rlora.device import hardware
    from rlora.model.base import locate
    from rlora.run import checkpoint, resume
    from rlora.run.prepare import report_changes
    from rlora.run.replay import pairs, replay, updates
    from rlora.run.start import read_start

    run, step = split(options.run)
    check_same_policy(read_run(run), options.config, "rlora replay")
    if step is not None and options.step not in (None, step):
        raise RloraError(f"--step {options.step}: {options.run} names a different version; use one of the two")
    step = options.step if step is None else step
    steps = updates(checkpoint.versions(run), step)
    if not steps:
        raise RloraError(
            f"{run}: no two consecutive checkpoints are kept, and an update is recomputed from the checkpoints before "
            "and after the update; train further steps with a larger checkpoint.keep_last"
        )

    done, changed = [], False
    for made_under, group in groupby(pairs(run, steps), key=lambda pair: pair[1].config):
        config = with_changes(asdict(made_under), options.changes)
        report_changes(changes := differences(made_under, config), print)
        changed |= bool(changes)
        config = resume.with_kept_start(run, config)
        setup = Setup.of(config, read_start(config))
        with cluster.learning(config, locate(config.model)) as learner:
            for previous, bundle in group:
                version, made_on = f"version {bundle.version}", bundle.origin.machine
                if bundle.update is None and step is None:
                    print(f"{version}: skipped, because its checkpoint has no episodes (checkpoint.episodes_mib)")
                    continue
                if made_on != hardware():
                    print(f"{version}: made on a different machine ({made_on}; this is {hardware()})")
                done.append(replay(learner, setup, previous, bundle))
                _report_replayed(done[-1])
    exact = sum(update.exact and update.exact_state for update in done)
    skipped = f"; {len(steps) - len(done)} skipped" if len(done) < len(steps) else ""
    print(f"{exact} of {len(done)} updates bit for bit{skipped}")
    if not done:
        raise RloraError(
            f"{run}: no update was recomputed, for the reasons above; train further steps with a "
            "checkpoint.episodes_mib that is large enough to store the episodes, or replay a different run"
        )
    if exact < len(done) and not changed:
        first = next(update.step for update in done if not (update.exact and update.exact_state))
        raise RloraError(
            f"{run}: {len(done) - exact} of {len(done)} updates differ from the saved updates, first version {first} "
            f"-> {first + 1}; replay with the packages and on the kind of machine (processor, cores, GPU) that "
            f"{run}/bundles/{first + 1}/bundle.json names. On a GPU, set learner.deterministic = true when training a "
            "run that is to be replayed"
        )


def _report_replayed(update: "Replayed") -> None:
    figures = {
        name: value for name, value in asdict(update.stats).items() if isinstance(value, float) and name != "seconds"
    }
    verdict = "bit for bit"
    if not update.exact:
        verdict = f"differs by up to {update.max_difference:.3g}, of an update of up to {update.max_change:.3g}"
        if update.rows_were_shared:
            verdict += " (made by a release in which policy and critic shared rows, so sums were rounded otherwise)"
    elif not update.exact_state:
        verdict = "the adapter bit for bit, but not the optimizer's state"
    print(
        f"version {update.step} -> {update.step + 1}: {verdict}; "
        + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()),
        flush=True,
    )
