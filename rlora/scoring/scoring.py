"""Scores groups and gets an env's replies, in processes where a bad call can take nothing else down with it."""

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

from rlora.model.chat import Chat
from rlora.records import Episode, Group, RewardError, RewardInput, Score
from rlora.scoring.worker import EnvReply, EnvTurn, names_of
from rlora.settings import Config

_KIND = re.compile(r".*?( raised \w+| returned )", re.DOTALL)


class Pool(Protocol):
    """Processes that score and answer: a `scoring.pool.Pool`, here or in a Ray actor."""

    def do(self, of: RewardInput | EnvTurn) -> Future[Any]:
        """Of a RewardInput the scores by reward function and episode, of a EnvTurn an EnvReply."""
        ...


class Scoring:
    """Gives each case and turn to the pool with the fewest in flight, and makes rewards of what comes back."""

    def __init__(self, config: Config, pools: Sequence[Pool], prompts: int = 0) -> None:
        self.config, self.pools = config, pools
        self._prompts = prompts  # that there are to train on, where it is known
        self.last_error = ""
        self._told: set[str] = set()  # kinds of errors that were shown
        self._flying = [0] * len(pools)
        self._names = names_of(config.rewards)
        self._weights = config.reward_weights or (1.0,) * len(self._names)

    async def score(self, group: Group, chat: Chat, step: int) -> Group:
        """The group with statuses, rewards and their parts; what no reward function speaks of has no reward."""
        if not self._names:
            return group
        verdicts: list[list[Score]] = await self._ask(self._case(group, chat, step))
        episodes = zip(group.episodes, zip(*verdicts, strict=True), strict=True)
        return replace(group, episodes=tuple(self._scored(episode, scores) for episode, scores in episodes))

    def _case(self, group: Group, chat: Chat, step: int) -> RewardInput:
        case = reward_input(group, chat, step, self.config.steps)
        sampled = step * self.config.prompts_per_step
        return replace(case, epoch=sampled / self._prompts) if self._prompts else case

    async def answer(self, turn: EnvTurn) -> EnvReply:
        """What the env says to a message of the policy."""
        answered: EnvReply = await self._ask(turn)
        self._tell(answered.detail)
        return answered

    def refuse_errors(self, groups: Sequence[Group]) -> None:
        """Raise RewardError where a larger share of the episodes than `scoring.max_errors` is in error."""
        statuses = [episode.status for group in groups for episode in group.episodes]
        errors, most = statuses.count("error"), self.config.scoring.max_errors
        if errors > most * len(statuses):
            raise RewardError(
                f"{self.last_error}\n{errors} of {len(statuses)} episodes are in error, and scoring.max_errors = "
                f"{most:g} is the largest share that a step may have; mend what failed, or raise it"
            )

    async def _ask(self, of: RewardInput | EnvTurn) -> Any:
        number = min(range(len(self.pools)), key=self._flying.__getitem__)
        self._flying[number] += 1
        try:
            return await asyncio.wrap_future(self.pools[number].do(of))
        finally:
            self._flying[number] -= 1

    def _scored(self, episode: Episode, scores: Sequence[Score]) -> Episode:
        """Its reward is the weighted sum of what each function gives, where it gives something."""
        settings = self.config.scoring
        parts: dict[str, float] = {}
        total: float | None = None
        for name, weight, score in zip(self._names, self._weights, scores, strict=True):
            self._tell(score.detail)
            value = score.value if score.value is not None or not score.status else getattr(settings, score.status)
            if value is not None:
                parts[name] = value
                total = (total or 0.0) + weight * value
            parts |= {f"{name}/{key}": figure for key, figure in score.extra.items()}
        statuses = [status for status in (episode.status, *(score.status for score in scores)) if status]
        failed = [status for status in ("error", "timeout") if status in statuses]
        if episode.status:  # the env failed
            total = getattr(settings, episode.status)
        first = next(iter(parts.values()), 0.0)  # the rewards of form and length beside it say nothing of the answer
        passed = "correct" if first >= self.config.evaluate.threshold else "wrong"
        status = [*failed, *statuses, passed][0] if total is not None else ""
        return replace(episode, reward=total, status=status, parts=parts)

    def _tell(self, detail: str) -> None:
        """Show an error, and none of its kind again: the same exception on the same line, whatever its message."""
        if not detail:
            return
        self.last_error = detail
        kind = _KIND.match(detail)
        if (told := kind[0] if kind else detail) not in self._told:
            self._told.add(told)
            print(detail.encode("utf-8", "backslashreplace").decode(), flush=True)


def reward_input(group: Group, chat: Chat, step: int, steps: int) -> RewardInput:
    """The group as reward functions see it."""
    return RewardInput(
        prompt=group.prompt.text,
        prompt_text=chat.shown(group.prompt.token_ids),
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
        queries=tuple(chat.shown(group.prompt.token_ids + episode.completion_ids) for episode in group.episodes),
        step=step,
        steps=steps,
        epoch=None if step else 0.0,
        prompt_ids=group.prompt.token_ids,
    )
