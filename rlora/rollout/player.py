"""Plays prompts to scored groups: the policy's turns and the env's, then the rewards."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from rlora.records import Adapter, Episode, Group, InFlight, Messages, Prompt, Sampling, StaleError
from rlora.rollout.fleet import Fleet
from rlora.rollout.requests import Request
from rlora.rollout.task import Task
from rlora.scoring.scoring import Scoring
from rlora.scoring.worker import EnvTurn


@dataclass(eq=False)
class Flight:
    """A prompt on its way to a scored group."""

    request: Request  # its first turn's
    scored: Future[Group] = field(default_factory=Future)
    turns: list[Request] = field(default_factory=list)  # the later ones'
    played: Group | None = None  # once it is played to its end, scored or not
    reward_seconds: float = 0.0  # from its last token to its rewards

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for request in (self.request, *self.turns):
            request.cancelled = True


class AgentLoop:
    """Plays the prompts of one policy, as coroutines on one thread: sampling, the env's replies, and scoring.

    An episode of several turns stays with the adapter that it began with. Tokens are appended and never made again from
    text: what the env says comes after the policy's own, and is marked as not its own.
    """

    def __init__(self, task: Task, fleet: Fleet, scoring: Scoring, policy: str) -> None:
        self.task, self.fleet, self.scoring, self.policy = task, fleet, scoring, policy
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(
        self,
        prompt: Prompt,
        sampling: Sampling,
        step: int = 0,
        adapter: Adapter | None = None,
        background: bool = False,
    ) -> Flight:
        """Begin with a prompt, whose group is scored as one of `step`; `adapter` and `background` are the fleet's."""
        flight = Flight(self.fleet.generate(prompt, sampling, self.policy, adapter, background))
        asyncio.run_coroutine_threadsafe(self._fly(flight, step), self._loop)
        return flight

    def go_on(self, before: InFlight, prompt: Prompt, sampling: Sampling) -> Flight:
        """What another loop had in flight: nothing that it has sampled or scored is done again."""
        if not before.group:
            return self.start(prompt, sampling, before.step, before.adapter)
        group = replace(before.group, prompt=prompt)
        flight = Flight(Request(prompt, sampling, self.policy, adapter=before.adapter), played=group)
        flight.request.group.set_result(group)
        if before.scored:
            flight.scored.set_result(group)
        else:
            asyncio.run_coroutine_threadsafe(self._fly(flight, before.step), self._loop)
        return flight

    def close(self) -> None:
        """Go on with nothing any more; what is being scored is not waited for."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        if left := asyncio.all_tasks(self._loop):
            for each in left:
                each.cancel()
            self._loop.run_until_complete(asyncio.wait(left))
        self._loop.close()

    async def _fly(self, flight: Flight, step: int) -> None:
        try:
            if not flight.played:
                group = await asyncio.wrap_future(flight.request.group)
                episodes = await asyncio.gather(*(self._play(flight, episode) for episode in group.episodes))
                flight.played = replace(group, episodes=tuple(episodes))
            start = time.perf_counter()
            scored = await self.scoring.score(flight.played, self.task.chat, step)
            flight.reward_seconds = time.perf_counter() - start
            flight.scored.set_result(scored)
        except BaseException as error:  # whoever waits for it is told, and its other episodes end with their turn
            flight.cancel()
            flight.scored.set_exception(error)

    async def _play(self, flight: Flight, episode: Episode) -> Episode:
        """EnvTurn by turn until the env has no more to say, or there is no more room."""
        chat, prompt, sampling = self.task.chat, flight.request.prompt, flight.request.sampling
        messages: list[dict[str, str]] = []
        state: dict[str, object] = {}
        asked: str | Messages = prompt.text  # what the policy's message answers
        message_at = turn_at = 0  # where in the completion the policy's message, and its last turn, begin
        while self.task.agent and episode.finish_reason == "stop":
            turn = chat.text(episode.completion_ids[turn_at:], turn_at == message_at, asked)
            answered = await self.scoring.answer(EnvTurn(prompt, turn, state))
            state = dict(answered.state)
            if answered.said is None:
                episode = replace(episode, status=answered.status)
                break
            said = chat.reply_ids(answered.said, episode.completion_ids)
            so_far = episode.completion_ids + said
            if len(so_far) >= sampling.max_tokens:
                episode = replace(episode, finish_reason="context")
                break
            if not isinstance(answered.said, str):
                text = chat.text(episode.completion_ids[message_at:], prompt=asked)
                messages += [{"role": "assistant", "content": text}, *answered.said]
                message_at, asked = len(so_far), chat.conversation(answered.said)
            turn_at = len(so_far)
            episode = _followed(episode, said, await self._next_turn(flight, so_far))
        text = chat.text(episode.completion_ids[message_at:], prompt=asked)
        return replace(episode, text=text, messages=(*messages, {"role": "assistant", "content": text}), state=state)

    async def _next_turn(self, flight: Flight, so_far: tuple[int, ...]) -> Episode:
        """The policy's tokens after the prompt and `so_far`, under the version that the episode began with."""
        request = flight.request
        if request.cancelled:
            raise StaleError(f"version {request.version}: nobody waits for it any more")
        prompt = replace(request.prompt, token_ids=request.prompt.token_ids + so_far)
        sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(so_far), group_size=1)
        turn = self.fleet.generate(prompt, sampling, self.policy, request.adapter, request.background)
        flight.turns.append(turn)
        return (await asyncio.wrap_future(turn.group)).episodes[0]


def _followed(episode: Episode, said: Sequence[int], turn: Episode) -> Episode:
    """The episode, what the env said, and the policy's next turn."""
    own = episode.sampled_mask or (True,) * len(episode.completion_ids)
    return replace(
        turn,
        completion_ids=episode.completion_ids + tuple(said) + turn.completion_ids,
        behaviour_logprobs=episode.behaviour_logprobs + (0.0,) * len(said) + turn.behaviour_logprobs,
        sampled_mask=own + (False,) * len(said) + (True,) * len(turn.completion_ids),
    )
