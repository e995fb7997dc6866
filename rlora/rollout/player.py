"""Plays prompts to scored groups: the policy's turns, the env's replies, then the rewards."""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from rlora.records import Adapter, Episode, Group, Messages, Prompt, Sampling, StaleError
from rlora.rollout.cursor import InFlight
from rlora.rollout.fleet import Fleet
from rlora.rollout.requests import Request
from rlora.rollout.task import Task
from rlora.scoring.scoring import Scoring
from rlora.scoring.worker import EnvReply, EnvTurn


@dataclass(eq=False)
class Flight:
    """A prompt that an AgentLoop plays, from the first request to the scored group."""

    request: Request  # samples the first turn of all episodes
    scored: Future[Group] = field(default_factory=Future)  # the result
    turns: list[Request] = field(default_factory=list)  # sample the later turns, one episode each
    played: Group | None = None  # the finished episodes, scored or not; None while one is being played
    reward_seconds: float = 0.0  # from the last token to the rewards

    def cancel(self) -> None:
        """Mark the requests as cancelled, because no caller waits for them: they are not sent or retried any more."""
        for request in (self.request, *self.turns):
            request.cancelled = True


class AgentLoop:
    """Plays the prompts of one policy, as coroutines on one thread: sampling, the env's replies, and scoring.

    A turn is what the policy samples at once, up to the env's next reply. All turns of an episode are sampled under the
    version of the first turn. Tokens are appended and never re-tokenized from text. The tokens of the env's replies are
    in the completion too, and are False in `sampled_mask`.
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
        """Start to sample and score a group of `prompt`, without blocking. The flight's `scored` raises all errors.

        `step` is passed to the reward functions, and `adapter` and `background` to `Fleet.generate`.
        """
        flight = Flight(self.fleet.generate(prompt, self._with_stops(sampling), self.policy, adapter, background))
        asyncio.run_coroutine_threadsafe(self._finish(flight, step), self._loop)
        return flight

    def resume(self, previous: InFlight, prompt: Prompt, sampling: Sampling) -> Flight:
        """Continue a prompt that an earlier process had in flight, without blocking.

        If the group of `previous` is sampled, only the scoring remains. If the group is scored, the flight is done.
        """
        if not previous.group:
            return self.start(prompt, sampling, previous.step, previous.adapter)
        group = replace(previous.group, prompt=prompt)
        request = Request(prompt, self._with_stops(sampling), self.policy, adapter=previous.adapter)
        flight = Flight(request, played=group)
        flight.request.group.set_result(group)
        if previous.scored:
            flight.scored.set_result(group)
        else:
            asyncio.run_coroutine_threadsafe(self._finish(flight, previous.step), self._loop)
        return flight

    def close(self) -> None:
        """Stop the thread, and cancel groups that are being played or scored: their futures raise CancelledError."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        if tasks := asyncio.all_tasks(self._loop):
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(tasks))
        self._loop.close()

    def _with_stops(self, sampling: Sampling) -> Sampling:
        return replace(sampling, stop_token_ids=self.task.chat.stop_token_ids, stop=self.task.stop)

    async def _finish(self, flight: Flight, step: int) -> None:
        """Play and score the group, and set the result or the exception of `flight.scored`."""
        try:
            if not flight.played:
                group = await asyncio.wrap_future(flight.request.group)
                episodes = await asyncio.gather(*(self._play(flight, episode) for episode in group.episodes))
                flight.played = replace(group, episodes=tuple(episodes))
            start = time.perf_counter()
            scored = await self.scoring.score(flight.played, self.task.chat, step)
            flight.reward_seconds = time.perf_counter() - start
            flight.scored.set_result(scored)
        except BaseException as error:  # `scored` carries it; the other episodes end with their current turn
            flight.cancel()
            flight.scored.set_exception(error)

    async def _play(self, flight: Flight, episode: Episode) -> Episode:
        """Alternate turns of the env and the policy until the env ends the episode or no room is left for tokens."""
        chat, prompt, sampling = self.task.chat, flight.request.prompt, flight.request.sampling
        messages: list[Mapping[str, Any]] = []
        state: dict[str, Any] = {}
        context: str | Messages = prompt.text  # the policy's current message answers this
        message_start = turn_start = 0  # indices in the completion: the policy's current message, and its last turn
        while self.task.agent and episode.finish_reason == "stop":
            turn = chat.text(episode.completion_ids[turn_start:], turn_start == message_start, context)
            reply = await self._reply(EnvTurn(prompt, turn, state), messages)
            state = dict(reply.state)
            if reply.content is None:
                episode = replace(episode, status=reply.status)
                break
            reply_ids = chat.reply_ids(reply.content, episode.completion_ids)
            completion_ids = episode.completion_ids + reply_ids
            if len(completion_ids) >= sampling.max_tokens:
                episode = replace(episode, finish_reason="context")
                break
            if not isinstance(reply.content, str):
                text = chat.text(episode.completion_ids[message_start:], prompt=context)
                messages += [self._message(text), *reply.content]
                message_start, context = len(completion_ids), chat.conversation(reply.content)
            turn_start = len(completion_ids)
            episode = _append_turn(episode, reply_ids, await self._sample_turn(flight, completion_ids))
        text = chat.text(episode.completion_ids[message_start:], prompt=context)
        return replace(episode, text=text, messages=(*messages, self._message(text)), state=state)

    def _message(self, text: str) -> Mapping[str, Any]:
        """Return the policy's message as a chat message."""
        return self.task.tools.message(text) if self.task.tools else {"role": "assistant", "content": text}

    async def _reply(self, turn: EnvTurn, messages: Messages) -> EnvReply:
        """Return the results of the tools that a message calls, else the env's reply. `messages` are those so far."""
        tools = self.task.tools
        calls = tools.calls(turn.message) if tools else []
        if not tools or not calls:
            return await self.scoring.answer(turn)
        made = sum(message["role"] == "tool" for message in messages)
        if tools.max_calls is not None and made + len(calls) > tools.max_calls:
            return EnvReply(None, turn.state)
        return await tools.answer(calls, turn, self.scoring)

    async def _sample_turn(self, flight: Flight, completion_ids: tuple[int, ...]) -> Episode:
        """Sample the policy's tokens after the prompt and `completion_ids`, under the version of the first turn."""
        request = flight.request
        if request.cancelled:
            raise StaleError(f"version {request.version}: the request was cancelled")
        prompt = replace(request.prompt, token_ids=request.prompt.token_ids + completion_ids)
        sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(completion_ids), group_size=1)
        turn = self.fleet.generate(prompt, sampling, self.policy, request.adapter, request.background)
        flight.turns.append(turn)
        return (await asyncio.wrap_future(turn.group)).episodes[0]


def _append_turn(episode: Episode, reply_ids: Sequence[int], turn: Episode) -> Episode:
    """Return the episode followed by the env's reply and the policy's next turn."""
    mask = episode.sampled_mask or (True,) * len(episode.completion_ids)
    return replace(
        turn,
        completion_ids=episode.completion_ids + tuple(reply_ids) + turn.completion_ids,
        behaviour_logprobs=episode.behaviour_logprobs + (0.0,) * len(reply_ids) + turn.behaviour_logprobs,
        sampled_mask=mask + (False,) * len(reply_ids) + (True,) * len(turn.completion_ids),
        kept=episode.kept + turn.kept if episode.kept and turn.kept else None,
    )
