import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlora.config import validate
from rlora.model.base import load_tokenizer
from rlora.model.chat import Chat
from rlora.records import (
    Adapter,
    Episode,
    Group,
    Prompt,
    RewardError,
    RewardInput,
    RloraError,
    Sampling,
    Score,
    Version,
)
from rlora.rollout.cursor import Cursor, InFlight
from rlora.rollout.player import AgentLoop
from rlora.rollout.requests import Request
from rlora.rollout.stream import Rollouts, prompt_at, sampling_of
from rlora.rollout.task import Task
from rlora.scoring.scoring import Scoring
from rlora.scoring.signatures import reward_function
from rlora.scoring.worker import EnvReply, EnvTurn
from rlora.settings import ChatConfig, Config

PROMPTS = [Prompt("?", answer=number, token_ids=(number,)) for number in range(5)]


def version_of(number: int) -> Version:
    """The version of the adapter that FakeFleet samples under."""
    return Adapter("run", number, b"{}", b"").version


class FakeFleet:
    """Completes a prompt with its token ids, immediately unless its answer is in `held`."""

    def __init__(self) -> None:
        self.version = 0
        self.held: set[int] = set()
        self.requests: list[Request] = []

    def generate(
        self, prompt: Prompt, sampling: Sampling, policy: str, adapter: Adapter | None = None, background: bool = False
    ) -> Request:
        request = Request(prompt, sampling, policy, adapter=adapter or Adapter(policy, self.version, b"{}", b""))
        self.requests.append(request)
        if prompt.answer not in self.held:
            answer(request)
        return request

    def check(self) -> None:
        pass


def answer(request: Request) -> None:
    assert request.version is not None
    episode = Episode(request.prompt.token_ids[:1], (-1.0,), "stop", request.version)
    request.group.set_result(Group(request.prompt, (episode,) * request.sampling.group_size))


class FakeTokenizer:
    """Tokens are numbers; text lists them."""

    chat_template = None

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split()]


class InProcessPool:
    """Scores and replies in this process."""

    def __init__(self, reward: Callable[..., Any], reply: Callable[..., Any] | None = None) -> None:
        self.reward_function, self.reply = reward_function("mine.py:f", reward), reply
        self.groups: list[RewardInput] = []

    def submit(self, job: RewardInput | EnvTurn) -> Future[Any]:
        done: Future[Any] = Future()
        if isinstance(job, RewardInput):
            self.groups.append(job)
            done.set_result([self.reward_function(job, range(len(job.completions)))])
        else:
            assert self.reply
            state = dict(job.state)
            done.set_result(EnvReply(self.reply(job.prompt, job.message, state), state))
        return done


def equal(completions: list[str], answers: list[Any]) -> list[float]:
    return [float(int(c) == a) for c, a in zip(completions, answers, strict=True)]


@pytest.fixture
def rollouts() -> Iterator[Callable[..., Rollouts]]:
    all_rollouts: list[Rollouts] = []

    def make(
        reward: Callable[..., Any] = equal, reply: Callable[..., Any] | None = None, cursor: Any = None, **changes: Any
    ) -> Rollouts:
        values = {"model": "-", "env": "-", "reward": "mine.py:f", "prompts_per_step": 4, "group_size": 2, "steps": 10}
        engine = {"straggler_seconds": 0.2}
        config: Config = validate(values | {"engine": engine} | changes)
        fleet: Any = FakeFleet()
        chat = Chat(FakeTokenizer(), ChatConfig(), ())  # type: ignore[arg-type]
        task = Task("", chat, (), reply is not None, PROMPTS, [], 0)
        loop = AgentLoop(task, fleet, Scoring(config, [InProcessPool(reward, reply)]), "run")
        all_rollouts.append(Rollouts(config, PROMPTS, fleet, loop, cursor or Cursor()))
        return all_rollouts[-1]

    yield make
    for stream in all_rollouts:
        stream.loop.close()


def fleet_of(rollouts: Rollouts) -> FakeFleet:
    return rollouts.fleet  # type: ignore[return-value]


def answers(groups: tuple[Group, ...]) -> list[int]:
    return [group.prompt.answer for group in groups]


def order(count: int) -> list[int]:
    return [prompt_at(PROMPTS, position, seed=0).answer for position in range(count)]


def test_a_step_gets_its_prompts_groups_in_their_order_with_rewards(rollouts: Callable[..., Rollouts]) -> None:
    stream = rollouts()
    collection = stream.take(0)
    assert answers(collection.groups) == order(4)
    assert all(group.rewards == [1.0, 1.0] for group in collection.groups)
    assert (collection.late, collection.stale) == (0, 0)
    assert len(fleet_of(stream).requests) == 4  # on policy: one step in flight


def test_steps_ahead_are_sampled_before_they_are_asked_for_and_no_more_than_the_run_needs(
    rollouts: Callable[..., Rollouts],
) -> None:
    stream = rollouts(max_staleness=1, steps=3)
    taken = []
    for version in range(3):
        fleet_of(stream).version = version
        taken.append(stream.take(version).groups)
    assert [answer for groups in taken for answer in answers(groups)] == order(12)
    versions = [{episode.version for group in groups for episode in group.episodes} for groups in taken]
    assert versions == [{version_of(0)}, {version_of(0)}, {version_of(1)}]
    assert len(fleet_of(stream).requests) == 12


def test_refills_do_not_wait_for_late_groups(rollouts: Callable[..., Rollouts]) -> None:
    stream = rollouts(algorithm={"refills": 2})
    slow = order(4)[2]
    fleet_of(stream).held = {slow}
    collection = stream.take(0)
    assert (answers(collection.sampled), collection.late) == ([a for a in order(4) if a != slow], 1)
    assert len(fleet_of(stream).requests) == 4


def test_a_refill_is_waited_for_no_longer_than_a_straggler(
    rollouts: Callable[..., Rollouts],
) -> None:
    stream = rollouts(algorithm={"refills": 2})
    held = order(5)[4]
    fleet_of(stream).held = {held}
    collection = stream.take(0)  # all rewards are equal, so 4 more prompts are sent, once
    assert answers(collection.sampled) == [answer for answer in order(8) if answer != held]
    assert (collection.groups, collection.late) == ((), order(8).count(held))


def test_a_late_group_counts_for_a_later_step_while_it_is_fresh(rollouts: Callable[..., Rollouts]) -> None:
    stream = rollouts(max_staleness=1)
    fleet = fleet_of(stream)
    slow = order(4)[1]
    fleet.held = {slow}
    first = stream.take(0)
    assert (answers(first.groups), first.late) == ([a for a in order(4) if a != slow], 1)
    fleet.version, fleet.held = 1, set()
    for request in fleet.requests:
        if not request.group.done():
            answer(request)
    second = stream.take(1)
    assert answers(second.groups)[0] == slow
    assert (second.late, second.stale, len(second.groups)) == (0, 0, 4)


def test_a_group_that_comes_too_late_is_counted_and_its_prompt_comes_first_again(
    rollouts: Callable[..., Rollouts],
) -> None:
    stream = rollouts()
    fleet = fleet_of(stream)
    slow = order(4)[1]
    fleet.held = {slow}
    assert stream.take(0).late == 1
    answer(fleet.requests[1])  # after the step: its version 0 is too stale
    fleet.version, fleet.held = 1, set()
    second = stream.take(1)
    assert (answers(second.groups)[0], second.stale) == (slow, 1)
    assert {episode.version for group in second.groups for episode in group.episodes} == {version_of(1)}
    assert answers(second.groups)[1:] == order(7)[4:]  # no prompt is skipped or repeated


def test_half_of_a_step_is_waited_for_however_long_it_takes(rollouts: Callable[..., Rollouts]) -> None:
    stream = rollouts(engine={"straggler_seconds": 0.01, "patience": 0.05})
    fleet = fleet_of(stream)
    fleet.held = set(order(4)[:3])
    checked = []

    def check() -> None:
        checked.append(True)
        if len(checked) == 2:
            answer(fleet.requests[0])

    fleet.check = check  # type: ignore[method-assign]
    collection = stream.take(0)
    assert (len(collection.groups), collection.late, len(checked)) == (2, 2, 2)


def raises(completions: list[str], answers: list[Any]) -> list[float]:
    raise KeyError("boom")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, r"test_stream\.py:\d+: f raised KeyError: 'boom'"),
        (lambda completions, answers: [float("nan"), 1.0], r"f returned nan; return a finite number"),
        (lambda completions, answers: [1.0], r"f returned .*1 .*2"),
        (lambda completions, answers: 1.0, r"f returned 1\.0"),
        (lambda completions, answers: ["1", "0"], r"f returned '1'"),
        (lambda completions, answers: [10**400, 1.0], r"f returned an object of type int"),
        (lambda completions, answers: [torch.ones(2), 1.0], r"f returned an object of type Tensor"),
    ],
)
def test_a_reward_that_fails_on_most_episodes_ends_the_step_and_what_was_sampled_is_kept(
    rollouts: Callable[..., Rollouts], reward: Callable[..., Any], message: str
) -> None:
    with pytest.raises(RewardError, match=message) as error:
        rollouts(reward).take(0)
    assert "8 of 8 episodes are in error, and scoring.max_errors = 0.5" in str(error.value)
    assert answers(error.value.groups) == order(4)
    assert error.value.groups[0].episodes[0].text == str(order(1)[0])


def test_an_episode_in_error_gets_its_status_and_number_and_the_others_theirs(
    rollouts: Callable[..., Rollouts], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = order(4)[2]

    def sometimes(completion: str, answer: int) -> float:
        return 1.0 / (int(completion) - bad)

    stream = rollouts(sometimes, scoring={"error": -0.5})
    collection = stream.take(0)
    statuses = [{episode.status for episode in group.episodes} for group in collection.sampled]
    assert statuses[2] == {"error"}
    assert collection.sampled[2].rewards == [-0.5, -0.5]
    assert "error" not in set.union(*statuses[:2], *statuses[3:])
    assert capsys.readouterr().err.count("ZeroDivisionError") == 1  # shown once, not for each episode


def test_statuses_are_numbers_as_the_config_has_it(rollouts: Callable[..., Rollouts]) -> None:
    def parity(completion: str, answer: int) -> str:
        return "correct" if int(completion) % 2 else "unparsable"

    collection = rollouts(parity, scoring={"correct": 2.0, "unparsable": -1.0}).take(0)
    for group in collection.sampled:
        assert group.rewards == [2.0 if group.prompt.answer % 2 else -1.0] * 2


def test_the_first_function_says_whether_an_answer_is_right_and_the_sum_is_the_reward() -> None:
    values = {"model": "-", "env": "-", "reward": ["a.py:right", "b.py:form"], "reward_weights": [0.5, 1.0]}
    scoring = Scoring(validate(values), [])
    sampled = Episode((1,), (-1.0,), "stop", version_of(0))
    wrong = scoring._scored(sampled, [Score(value=0.0), Score(value=1.0)])
    right = scoring._scored(sampled, [Score(value=1.0), Score(value=0.0, extra={"x": 2.0})])
    assert (wrong.reward, wrong.status, dict(wrong.parts)) == (1.0, "wrong", {"right": 0.0, "form": 1.0})
    assert (right.reward, right.status, dict(right.parts)) == (
        0.5,
        "correct",
        {"right": 1.0, "form": 0.0, "form/x": 2.0},
    )


def test_an_error_is_shown_once_for_each_line_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    scoring = Scoring(validate({"model": "-", "env": "-", "reward": "a.py:f"}), [])
    details = [
        "a.py:3: f raised ValueError: invalid literal for int(): 'one'; fix the function",
        "a.py:3: f raised ValueError: invalid literal for int(): 'two'; fix the function",
        "a.py:3: f raised KeyError: 'two'; fix the function",
        "a.py:4: f raised ValueError: 'one'; fix the function",
        "a.py:1: f returned 'a word'; return a finite number",
        "a.py:1: f returned 'another'; return a finite number",
        "scoring.deadline = 1: f took longer",
        "scoring.deadline = 1: f took longer",
    ]
    sampled = Episode((1,), (-1.0,), "stop", version_of(0))
    for detail in details:
        scoring._scored(sampled, [Score("error", detail=detail)])
    assert capsys.readouterr().err.splitlines() == [f"rlora: {details[k]}" for k in (0, 2, 3, 4, 6)]
    assert scoring.last_error == details[-1]


def test_episodes_without_a_reward_are_not_learned_from(rollouts: Callable[..., Rollouts]) -> None:
    skipped = order(4)[1]

    def some(completions: list[str], answers: list[int]) -> list[float | None]:
        return [None, 1.0] if answers[0] == skipped else [0.0, 1.0]

    collection = rollouts(some).take(0)
    assert answers(collection.sampled) == order(4)
    # the group with one reward has no baseline
    assert answers(collection.groups) == [answer for answer in order(4) if answer != skipped]
    assert collection.sampled[1].rewards == [1.0]


def test_a_new_process_resumes_with_late_prompts_first(rollouts: Callable[..., Rollouts]) -> None:
    stream = rollouts(max_staleness=1)
    late = order(4)[1]
    fleet_of(stream).held = {late}
    stream.take(0)
    wait([sent.flight.scored for sent in stream._sent if sent.flight.request.prompt.answer != late])
    cursor = stream.cursor
    assert (cursor.next, cursor.retries) == (8, ())
    assert [prompt.position for prompt in cursor.in_flight] == [1, 4, 5, 6, 7]
    assert rollouts(cursor=cursor).cursor == cursor
    resumed = rollouts(cursor=cursor, max_staleness=1)
    assert answers(resumed.take(1).sampled) == [late, *order(8)[4:7]]
    requests = fleet_of(resumed).requests
    again = [answer for answer in order(8)[4:] if answer == late]
    assert [request.prompt.answer for request in requests] == [late, *again, *order(11)[8:]]  # others were sampled


def test_groups_sampled_and_scored_by_an_earlier_process_are_not_redone(rollouts: Callable[..., Rollouts]) -> None:
    old, played = Adapter("run", 3, b"{}", b""), PROMPTS[order(3)[2]]
    episode = Episode((played.answer,), (-1.0,), "stop", old.version, text=str(played.answer))
    unscored = Episode((2,), (-1.0,), "stop", old.version)
    scored = Group(PROMPTS[order(2)[1]], (Episode((1,), (-1.0,), "stop", old.version, reward=0.25), unscored))
    cursor = Cursor(4, (), (
        InFlight(1, 3, old, scored, scored=True),
        InFlight(2, 3, old, Group(played, (episode,) * 2)),
        InFlight(3, 3, old),
    ))  # fmt: skip
    stream = rollouts(cursor=cursor, max_staleness=1, prompts_per_step=3)
    fleet_of(stream).version = 4
    taken = stream.take(4)
    assert [group.rewards for group in taken.sampled] == [[0.25], [1.0, 1.0], [1.0, 1.0]]
    first = fleet_of(stream).requests[0]
    pinned = first.prompt, first.version
    assert pinned == (PROMPTS[order(4)[3]], old.version)  # the version in its cursor
    assert {request.version for request in fleet_of(stream).requests[1:]} == {version_of(4)}
    pool: Any = stream.loop.scoring.pools[0]
    assert [group.answer for group in pool.groups if group.step == 3] == [played.answer, first.prompt.answer]


def test_inherited_prompts_that_are_too_stale_are_sampled_again(rollouts: Callable[..., Rollouts]) -> None:
    stale = InFlight(0, 1, Adapter("run", 1, b"{}", b""))
    stream = rollouts(cursor=Cursor(1, (), (stale,)), max_staleness=1)
    fleet_of(stream).version = 3
    taken = stream.take(3)
    assert taken.stale == 1
    assert answers(taken.sampled) == order(4)
    assert {group.episodes[0].version for group in taken.sampled} == {version_of(3)}


def test_a_failed_fleet_ends_the_step(rollouts: Callable[..., Rollouts]) -> None:
    stream = rollouts()
    fleet = fleet_of(stream)
    fleet.held = set(order(4))
    gone: Future[Group] = Future()
    gone.set_exception(RuntimeError("every engine is gone"))
    fleet.generate = lambda prompt, sampling, policy, *_: Request(prompt, sampling, policy, gone)  # type: ignore
    with pytest.raises(RuntimeError, match="every engine is gone"):
        stream.take(0)


def test_each_epoch_goes_once_through_all_prompts_in_its_own_order() -> None:
    seen = order(10)
    first, second = seen[:5], seen[5:]
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    assert [prompt_at(PROMPTS, position, seed=1).answer for position in range(10)] != seen


def test_groups_with_equal_rewards_are_refilled_a_limited_number_of_times(rollouts: Callable[..., Rollouts]) -> None:
    def sometimes(completions: list[str], answers: list[Any]) -> list[float]:
        return [0.0, float(int(completions[0]) >= 2)]  # prompts 0 and 1 have no learning signal

    def informative(answer: int) -> bool:
        return answer >= 2

    for refills in (1, 3):
        stream = rollouts(sometimes, algorithm={"refills": refills})
        collection = stream.take(0)
        taken = answers(collection.sampled)
        assert taken == order(len(taken))
        assert answers(collection.groups) == [answer for answer in taken if informative(answer)]
        assert len(fleet_of(stream).requests) == len(taken) > 4
    assert len(collection.groups) == 4
    assert len(rollouts(sometimes).take(0).groups) == 4  # without refills all groups are learned from


# --- several turns ---


def dialogue(prompt: Prompt, message: str, state: dict[str, Any]) -> str | None:
    """Replies "7 8" twice, then ends the episode."""
    state["turns"] = [*state.get("turns", []), message]
    return "7 8" if len(state["turns"]) <= 2 else None


def last_number(completion: str, answer: int) -> float:
    return float(completion.rsplit(maxsplit=1)[-1])


def test_turns_are_appended_under_one_version_and_the_envs_tokens_are_masked(
    rollouts: Callable[..., Rollouts],
) -> None:
    stream = rollouts(last_number, dialogue, sampling={"max_tokens": 20, "max_prompt_tokens": 4})
    (group, *_) = stream.take(0).sampled
    n = group.prompt.answer
    for episode in group.episodes:
        assert episode.completion_ids == (n, 7, 8, n, 7, 8, n)
        assert episode.sampled_mask == (True, False, False, True, False, False, True)
        assert episode.behaviour_logprobs == (-1.0, 0.0, 0.0, -1.0, 0.0, 0.0, -1.0)
        assert (episode.sampled_tokens, episode.finish_reason, episode.version) == (3, "stop", version_of(0))
        assert episode.text == f"{n} 7 8 {n} 7 8 {n}"
        assert episode.state == {"turns": [str(n)] * 3}
        assert episode.reward == n
    turns = [request for request in fleet_of(stream).requests if request.prompt.answer == n]
    assert [request.prompt.token_ids for request in turns[:2]] == [(n,), (n, n, 7, 8)]
    assert [(r.sampling.max_tokens, r.sampling.group_size) for r in turns] == [
        (20, 2),
        (17, 1),
        (17, 1),
        (14, 1),
        (14, 1),
    ]
    assert {request.adapter for request in turns} == {turns[0].adapter}


def test_an_episode_that_outgrows_its_context_ends_there_and_is_scored(rollouts: Callable[..., Rollouts]) -> None:
    stream = rollouts(last_number, dialogue, sampling={"max_tokens": 6, "max_prompt_tokens": 4})
    (group, *_) = stream.take(0).sampled
    n = group.prompt.answer
    assert [e.completion_ids for e in group.episodes] == [(n, 7, 8, n)] * 2  # the env's next two tokens leave no room
    assert {e.finish_reason for e in group.episodes} == {"context"}
    assert group.rewards == [n, n]


def test_a_reply_that_fails_costs_its_episode_only(rollouts: Callable[..., Rollouts]) -> None:
    bad = order(4)[0]
    stream = rollouts(last_number, dialogue, scoring={"error": -1.0})
    pool: Any = stream.loop.scoring.pools[0]
    submit = pool.submit

    def fails(job: RewardInput | EnvTurn) -> Future[Any]:
        if isinstance(job, EnvTurn) and job.prompt.answer == bad:
            done: Future[Any] = Future()
            done.set_result(EnvReply(None, {}, "error", "env = 'mine': reply() raised KeyError: 'x'"))
            return done
        return submit(job)  # type: ignore[no-any-return]

    pool.submit = fails
    groups = stream.take(0).sampled
    assert groups[0].rewards == [-1.0, -1.0]
    assert {episode.status for episode in groups[0].episodes} == {"error"}
    assert all(group.rewards == [group.prompt.answer] * 2 for group in groups[1:])


def test_each_message_begins_with_what_the_template_opens(rollouts: Callable[..., Rollouts], demo: str) -> None:
    """The env and the rewards read it, also in later turns."""

    def ask_again(prompt: Prompt, message: str, state: dict[str, Any]) -> list[dict[str, str]] | None:
        state["heard"] = [*state.get("heard", []), message]
        return [{"role": "user", "content": "Sure?"}] if len(state["heard"]) == 1 else None

    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    stream = rollouts(lambda completions: [1.0] * len(completions), ask_again, sampling={"max_tokens": 99})
    chat = Chat(load_tokenizer(demo), ChatConfig(template=template), ())
    stream.loop.task = replace(stream.loop.task, chat=chat)
    for group in stream.take(0).sampled:
        for episode in group.episodes:
            assert episode.state == {"heard": ["<think>\n", "<think>\n"]}  # FakeFleet samples a special token
            assert [m["content"] for m in episode.messages] == ["<think>\n", "Sure?", "<think>\n"]
            assert episode.text == "<think>\n"


def test_each_request_ends_where_the_task_says(rollouts: Callable[..., Rollouts]) -> None:
    """Also the later turns."""
    stream = rollouts(last_number, dialogue)
    stream.loop.task = replace(stream.loop.task, stop=("=",))
    stream.take(0)
    requests = stream.fleet.requests
    ends = {(request.sampling.stop_token_ids, request.sampling.stop) for request in requests}
    assert ends == {(stream.loop.task.chat.stop_token_ids, ("=",))}
    assert {request.sampling.group_size for request in requests} == {1, 2}


@pytest.mark.parametrize(
    ("temperature", "samples", "message"),
    [
        (0.0, 4, r"temperature = 0: it is greedy, so the 4 completions of a prompt would be the same"),
        (-1.0, 1, r"temperature = -1: use 0 \(greedy\), or 0\.01 or more"),
        (0.001, 1, r"temperature = 0\.001: use 0"),
        (math.nan, 1, r"temperature = nan: use 0"),
    ],
)
def test_a_temperature_that_the_engine_can_not_sample_at_is_refused(
    config: Callable[..., Config], temperature: float, samples: int, message: str
) -> None:
    with pytest.raises(RloraError, match=message):
        sampling_of(config(), samples, temperature)
