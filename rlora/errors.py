"""Exceptions that the packages raise. This module imports the standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RloraError(Exception):
    """A user-fixable error. The message names the field, the value and the fix."""


class RewardError(RloraError):
    """A reward function failed. `groups` has the groups that were sampled, with unscored episodes."""

    def __init__(self, message: str, groups: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.groups = tuple(groups)


class DeliveryError(RloraError):
    """An engine serves something other than the adapter version that was delivered to the engine."""


class EngineLostError(RloraError):
    """An engine's process died, or vLLM failed in that process. Another engine can repeat the engine's requests."""


class NotLoadedError(RloraError):
    """A request names an adapter version that the engine has not loaded."""


class StaleError(RloraError):
    """A request was aborted: its version is too old to learn from, its policy has left, or its group has failed."""
