"""Scores groups and gets an env's replies in worker processes, which isolate failing calls."""

import asyncio
import logging
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

from rlora.model.chat import Chat
from rlora.records import Episode, Group, RewardError, RewardInput, Score
from rlora.scoring.worker import EnvReply, EnvTurn, reward_names
from rlora.settings import Config

_log = logging.getLogger(__name__)

_KIND = re.compile(r".*?( raised \w+| returned )", re.DOTALL)


class Pool(Protocol):
    """Worker processes: a `scoring.pool.Pool`, in this process or in a Ray actor."""

    def submit(self, request: RewardInput | EnvTurn) -> Future[Any]:
        """Return a future: scores by reward function and episode for a RewardInput, an EnvReply for an EnvTurn."""
        ...


class Scoring:
    """Sends each request to the pool with the fewest requests in flight, and combines scores into rewards.

    `prompts` is the number of training prompts, from which TRL's `trainer_state.epoch` is computed; 0 if unknown.
    """

    def __init__(self, config: Config, pools: Sequence[Pool], prompts: int = 0) -> None:
        self.config, self.pools = config, pools
        self._prompts = prompts
        self.last_error = ""  # the last message of a failed call
        self._shown: set[str] = set()  # kinds of errors that were logged
        self._in_flight = [0] * len(pools)
        self._names = reward_names(config.rewards)
        self._weights = config.reward_weights or (1.0,) * len(self._names)

    async def score(self, group: Group, chat: Chat, step: int) -> Group:
        """Score a group at training step `step`. Returns the group with statuses, rewards and their parts.

        `chat` decodes the tokens for the functions. An episode that no function scores has no reward, a call that fails
        has the status "error" or "timeout". Raises RewardError if a worker process can't be restarted.
        """
        if not self._names:
            return group
        verdicts: list[list[Score]] = await self._submit(self._reward_input(group, chat, step))
        episodes = zip(group.episodes, zip(*verdicts, strict=True), strict=True)
        return replace(group, episodes=tuple(self._scored(episode, scores) for episode, scores in episodes))

    def _reward_input(self, group: Group, chat: Chat, step: int) -> RewardInput:
        inputs = reward_input(group, chat, step, self.config.steps)
        sampled = step * self.config.prompts_per_step
        return replace(inputs, epoch=sampled / self._prompts) if self._prompts else inputs

    async def answer(self, turn: EnvTurn) -> EnvReply:
        """Return the env's reply to a message of the policy. A failed reply has the status "error" or "timeout".

        Raises RewardError if a worker process can't be restarted.
        """
        reply: EnvReply = await self._submit(turn)
        self._show(reply.detail)
        return reply

    def check_errors(self, groups: Sequence[Group]) -> None:
        """Raise RewardError if the share of episodes with the status "error" is above `scoring.max_errors`."""
        statuses = [episode.status for group in groups for episode in group.episodes]
        errors, most = statuses.count("error"), self.config.scoring.max_errors
        if errors > most * len(statuses):
            raise RewardError(
                f"{self.last_error}\n{errors} of {len(statuses)} episodes are in error, and scoring.max_errors = "
                f"{most:g} is the largest share that a step may have; fix the error above, or raise scoring.max_errors"
            )

    async def _submit(self, request: RewardInput | EnvTurn) -> Any:
        number = min(range(len(self.pools)), key=self._in_flight.__getitem__)
        self._in_flight[number] += 1
        try:
            return await asyncio.wrap_future(self.pools[number].submit(request))
        finally:
            self._in_flight[number] -= 1

    def _scored(self, episode: Episode, scores: Sequence[Score]) -> Episode:
        """Return the episode with its reward, the weighted sum over the reward functions that scored the episode."""
        settings = self.config.scoring
        parts: dict[str, float] = {}
        total: float | None = None
        for name, weight, score in zip(self._names, self._weights, scores, strict=True):
            self._show(score.detail)
            value = score.value if score.value is not None or not score.status else getattr(settings, score.status)
            if value is not None:
                parts[name] = value
                total = (total or 0.0) + weight * value
            parts |= {f"{name}/{key}": figure for key, figure in score.extra.items()}
        statuses = [status for status in (episode.status, *(score.status for score in scores)) if status]
        failed = [status for status in ("error", "timeout") if status in statuses]
        if episode.status:  # the env failed
            total = getattr(settings, episode.status)
        first = next(iter(parts.values()), 0.0)  # later functions, for form or length, do not judge the answer
        passed = "correct" if first >= self.config.evaluate.threshold else "wrong"
        status = [*failed, *statuses, passed][0] if total is not None else ""
        return replace(episode, reward=total, status=status, parts=parts)

    def _show(self, detail: str) -> None:
        """Log an error as a warning, once per kind: the same exception on the same line, whatever its message."""
        if not detail:
            return
        self.last_error = detail
        kind = _KIND.match(detail)
        if (key := kind[0] if kind else detail) not in self._shown:
            self._shown.add(key)
            _log.warning(detail.encode("utf-8", "backslashreplace").decode())


def reward_input(group: Group, chat: Chat, step: int, steps: int) -> RewardInput:
    """Return the inputs of the reward functions for a group at step `step` of `steps`. `chat` decodes the tokens."""
    return RewardInput(
        prompt=group.prompt.text,
        prompt_text=chat.decode(group.prompt.token_ids),
        answer=group.prompt.answer,
        columns=group.prompt.columns,
        completions=tuple(episode.text for episode in group.episodes),
        messages=tuple(episode.messages for episode in group.episodes),
        completion_ids=tuple(episode.completion_ids for episode in group.episodes),
        states=tuple(episode.state for episode in group.episodes),
        responses=tuple(
            episode.text if len(episode.messages) == 1 else chat.text(episode.completion_ids)
            for episode in group.episodes
        ),
        queries=tuple(chat.decode(group.prompt.token_ids + episode.completion_ids) for episode in group.episodes),
        step=step,
        steps=steps,
        epoch=None if step else 0.0,
        prompt_ids=group.prompt.token_ids,
    )
