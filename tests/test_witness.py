"""Updates of runs that were recorded earlier come out as they were: a refactor changes no bit."""

from itertools import pairwise

import pytest
from upath import UPath
from witness import HOME, UPDATES, WITNESSES, base

from rlora import machine
from rlora.core.learner import Learner
from rlora.run import checkpoint
from rlora.run.replay import replay


@pytest.mark.parametrize("name", WITNESSES)
def test_a_recorded_run_replays_and_goes_on(name: str) -> None:
    bundles = [checkpoint.read(UPath(HOME / name / str(version))) for version in range(UPDATES + 1)]
    with base() as path:
        learner = Learner(bundles[0].config, path, "witness")
        assert learner.adapter().files == bundles[0].adapter.files  # A follows from the seed
        found = [replay(learner, before, after) for before, after in pairwise(bundles)]
    assert found[-1].moved > 1e-4
    if bundles[0].origin.machine == machine.name():
        assert all(replayed.exact and replayed.exact_state for replayed in found)
    else:  # other kernels round otherwise
        assert all(replayed.off < 1e-2 * found[-1].moved for replayed in found)
