"""Position of a run in its prompts, from which a resumed run continues."""

from __future__ import annotations

from dataclasses import dataclass

from rlora.records import Adapter, Group


@dataclass(frozen=True)
class InFlight:
    """A prompt that was sent for sampling and whose group has not been learned from yet."""

    position: int  # of the prompt in the run's order
    step: int  # the step that sent it
    adapter: Adapter | None = None  # the version that samples the prompt; None: the prompt waits for a free engine
    group: Group | None = None  # None: the prompt is still being sampled
    scored: bool = False  # whether the group is scored


@dataclass(frozen=True)
class Cursor:
    """State of a run's prompts between two steps, from which a resumed run continues. Positions count prompts in the
    run's order, over all epochs."""

    next: int = 0  # position of the next prompt that was never sent
    retries: tuple[int, ...] = ()  # positions of prompts to sample again, before `next`
    in_flight: tuple[InFlight, ...] = ()  # in the order of sending
