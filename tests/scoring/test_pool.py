"""A reward function that harms its process affects no other call."""

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, case
from hostile import hostile

from rlora.records import Prompt, RloraError, Score
from rlora.rewards.math.answer import is_empty
from rlora.scoring.pool import Pool
from rlora.scoring.worker import EnvReply, EnvTurn, Setup

SHADY = str(ROOT / "tests" / "shady_rewards.py")
MakePool = Callable[..., Pool]


def workers() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture
def pool() -> Iterator[MakePool]:
    pools = []
    previous = workers()

    def make(*functions: str, workers: int = 1, **settings: Any) -> Pool:
        rewards = tuple(f"{SHADY}:{name}" for name in functions)
        pools.append(Pool(Setup(rewards, **{"deadline": 1.0, "memory_mib": 512} | settings), workers))
        return pools[-1]

    yield make
    for started in pools:
        started.close()
    assert workers() <= previous


def scores(pool: Pool, *completions: str, answer: object = 7) -> list[Score]:
    verdicts = pool.submit(case(*completions, answer=answer)).result(timeout=60)
    assert isinstance(verdicts, list)
    return verdicts[0]


def values(scores: list[Score]) -> list[float | str | None]:
    return [score.status or score.value for score in scores]


@pytest.mark.parametrize(
    ("bad", "status", "detail"),
    [
        ("hang", "timeout", r"more than scoring\.deadline = 1 s"),
        ("hold the GIL", "timeout", r"more than scoring\.deadline = 1 s"),
        ("memory", "error", "MemoryError"),
        ("die", "error", r"the worker process ended \(exit status 3\)"),
        ("exit", "error", "SystemExit: 4"),
        ("raise", "error", r"shady_rewards\.py:\d+: shady raised KeyError: 'no judge today'"),
    ],
)
def test_a_call_that_goes_wrong_gets_a_status_and_all_others_their_scores(
    pool: MakePool, bad: str, status: str, detail: str
) -> None:
    made = pool("shady")
    earlier = [made.submit(case("7", "8", answer=7)) for _ in range(5)]
    results = scores(made, "7", bad, "8", bad)
    later = [made.submit(case("7", answer=7)) for _ in range(5)]
    assert values(results) == [1.0, status, 0.0, status]
    assert re.search(detail, results[1].detail)
    assert re.search(detail, results[3].detail)
    assert [values(future.result()[0]) for future in earlier] == [[1.0, 0.0]] * 5
    assert [values(future.result()[0]) for future in later] == [[1.0]] * 5


def test_only_the_call_at_fault_is_not_made_again(pool: MakePool, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    results = scores(pool("counted"), "die", "a", "b", answer=str(calls))
    assert values(results) == ["error", 2.0, 3.0]


def test_what_is_sent_while_another_hangs_is_done_by_the_other_workers(pool: MakePool) -> None:
    made = pool("shady", workers=2, deadline=3.0)
    hangs = made.submit(case("hang", answer=7))
    time.sleep(0.3)
    start = time.monotonic()
    assert values(scores(made, "7")) == [1.0]
    assert time.monotonic() - start < 2
    assert values(hangs.result()[0]) == ["timeout"]


def test_a_function_may_print_and_use_alarms_of_its_own(pool: MakePool, capfd: pytest.CaptureFixture[str]) -> None:
    assert values(scores(pool("shady", deadline=4.0), "print", "alarm", "7")) == [0.0, 0.5, 1.0]
    assert "a line on standard output" not in capfd.readouterr().out


def test_many_functions_are_called_on_each(pool: MakePool) -> None:
    verdicts: Any = pool("shady", "slow").submit(case("0", "0.1", answer=0)).result()
    assert [values(results) for results in verdicts] == [[1.0, 0.0], [1.0, 1.0]]


def test_coroutines_are_awaited_together_so_many_at_once_and_each_has_a_deadline(pool: MakePool) -> None:
    made = pool("judge", concurrency=8)
    start = time.monotonic()
    futures = [made.submit(case(*["0.4"] * 8)) for _ in range(2)]
    assert all(values(future.result()[0]) == [1.0] * 8 for future in futures)
    assert 0.8 <= time.monotonic() - start < 3  # one after the other would take 6.4
    assert values(scores(made, "0", "30", "0")) == [1.0, "timeout", 1.0]


def test_a_coroutine_that_blocks_the_others_costs_its_group_only(pool: MakePool) -> None:
    made = pool("blocking_judge")
    futures = [made.submit(case(*group)) for group in (("a", "b"), ("a", "block"), ("c",))]
    assert [values(future.result()[0]) for future in futures] == [[1.0, 1.0], ["timeout", "timeout"], [1.0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": (f"{SHADY}:missing",)}, r"reward = '.*': .* has no 'missing'"),
        ({"rewards": ("none.py:f",)}, r"reward = 'none\.py:f': there is no file none\.py"),
        ({"reward_args": {"over": 3}}, r"reward_args\.over = 3: no reward function has a parameter of that name"),
        ({"env": f"{SHADY}:Guarded", "env_args": {"": {"x": 1}}}, r"unexpected keyword argument 'x'"),
    ],
)
def test_what_can_not_be_loaded_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    previous = workers()
    with pytest.raises(RloraError, match=message):
        Pool(Setup(**{"rewards": (f"{SHADY}:shady",)} | settings), 2)
    assert workers() <= previous


def test_an_env_answers_where_rewards_run_and_keeps_what_it_knows(pool: MakePool) -> None:
    made = pool("shady", env=f"{SHADY}:Guarded", env_args={"": {"greeting": "hi"}, "polite": {"greeting": "good day"}})

    def answer(message: str, state: dict[str, Any], evaluation_set: str = "") -> EnvReply:
        prompt = Prompt("greet", answer="hello", evaluation_set=evaluation_set)
        reply = made.submit(EnvTurn(prompt, message, state)).result(timeout=60)
        assert isinstance(reply, EnvReply)
        return reply

    assert answer("hello", {"seen": 4}) == EnvReply("hi 5", {"seen": 5})
    assert answer("hello", {"seen": 4}, "polite") == EnvReply("good day 5", {"seen": 5})  # the set has its own env
    assert answer("chat", {}) == EnvReply([{"role": "user", "content": "and you?"}], {"seen": 1})
    assert answer("bye", {}) == EnvReply(None, {"seen": 1})
    for bad, detail in (
        ("raise", r"shady_rewards\.py:\d+: env = .*Guarded': reply\(\) raised ValueError: no such tool"),
        ("not plain", r"reply\(\) raised TypeError: .*not JSON serializable"),
        ("not plain inside", r"reply\(\) raised TypeError: .*not JSON serializable"),
        ("no text", r"reply\(\) raised ValueError: return a string, None or chat messages"),
        ("hang", r"more than scoring\.deadline = 1 s"),
    ):
        reply = answer(bad, {"seen": 4, "list": []})
        assert (reply.content, reply.state) == (None, {"seen": 4, "list": []})
        assert reply.status == ("timeout" if bad == "hang" else "error")
        assert re.search(detail, reply.detail)
    assert answer("surrogate", {}).content == "?"
    assert values(scores(made, "7")) == [1.0]


def test_coroutines_have_one_event_loop_over_all_batches(pool: MakePool) -> None:
    made = pool("loops")
    assert [values(scores(made, "a")) for _ in range(3)] == [[1.0]] * 3


def test_what_a_call_has_started_is_killed_with_it(pool: MakePool, tmp_path: Path) -> None:
    number = tmp_path / "pid"
    assert values(scores(pool("starts"), "a", answer=str(number))) == ["timeout"]
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(number.read_text())).wait(timeout=5)


def test_memory_that_calls_keep_is_not_held_against_later_ones(pool: MakePool) -> None:
    made = pool("keeps")
    assert [values(scores(made, "a")) for _ in range(12)] == [[1.0]] * 12  # 1,200 MiB, and a call may take 512


def test_closing_does_not_wait_for_what_was_never_begun(pool: MakePool) -> None:
    """A worker takes at most 64 jobs beside its first. How many it takes before the pool closes depends on timing."""
    made = pool("slow", deadline=5.0)
    worker_count = len(made._threads)
    futures = [made.submit(case("0.05")) for _ in range(400)]
    made.close()
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) >= 400 - 65 * worker_count


def test_fifty_thousand_pairs_leave_nothing_behind() -> None:
    """Some of the pairs are hostile."""
    previous = workers()
    pairs = [pair for pair in hostile() if len(pair[1]) < 1000 and not is_empty(pair[0])] + [
        ("7", "so it is \\boxed{7}"),
        ("1/2", "#### 0.5"),
    ] * 100
    made = Pool(Setup(("rlora.rewards.equivalence:math_answer",)), 2)
    with closing(made):
        sizes = []
        for _ in range(10):
            batch = itertools.islice(itertools.cycle(pairs), 5000)
            futures = [made.submit(case(text, answer=gold)) for gold, text in batch]
            statuses = Counter(future.result()[0][0].status for future in futures)
            sizes.append(sum(psutil.Process(pid).memory_info().rss for pid in workers()) / 2**20)
        assert statuses.keys() <= {"correct", "wrong", "unparsable", "timeout"}
        assert statuses["correct"] > 1000
    assert sizes[-1] - sizes[1] < 50  # MiB
    assert workers() <= previous


@pytest.mark.parametrize("name", ["lazy", "lazy_judge"])
def test_the_first_call_in_a_process_may_take_longer(pool: MakePool, name: str) -> None:
    made = pool(name, first_deadline=20.0)
    assert values(scores(made, "a", "b")) == [1.0, 1.0]
    start = time.monotonic()
    (score,) = scores(made, "hang")  # not the first call
    assert score.status == "timeout"
    assert score.detail.startswith(f"a call to {name} took more than scoring.deadline = 1 s; raise scoring.deadline")
    assert time.monotonic() - start < 10
    assert values(scores(made, "a")) == [1.0]  # the first call in the process that replaced it


def test_a_first_call_has_its_deadline_too_and_no_function_has_more_for_ever(pool: MakePool) -> None:
    made = pool("lazy", first_deadline=1.5)
    results = [scores(made, "hang")[0] for _ in range(4)]
    assert [score.status for score in results] == ["timeout"] * 4
    fields = [re.sub(r".*than scoring\.(.*) = .*", r"\1", score.detail) for score in results]
    assert fields == ["first_deadline", "first_deadline", "first_deadline", "deadline"]


def test_a_first_call_has_no_less_time_than_others(pool: MakePool) -> None:
    assert values(scores(pool("slow", first_deadline=0.1), "0.5")) == [1.0]


@pytest.mark.parametrize(
    ("names", "completion", "detail"),
    [
        (("with_a_key", "shady"), "die", "the worker process ended (exit status 3) in a call to shady; raise "
         "an exception instead of ending the process"),
        (("shady", "killed"), "9", "the worker process ended (signal 9) in a call to killed; most likely the "
         "machine ran out of memory: lower scoring.memory_mib = 512, or scoring.workers"),
        (("killed", "shady"), "6", "the worker process ended (signal 6) in a call to killed; if an allocation "
         "failed, raise scoring.memory_mib = 512"),
        (("killed",), "15", "the worker process ended (signal 15) in a call to killed"),
        (("slow", "dying_judge"), "0", "the worker process ended (exit status 3) in a call to dying_judge; "
         "raise an exception instead of ending the process"),
        (("judge", "dying_judge"), "0", "the worker process ended (exit status 3) in a call to judge or "
         "dying_judge; raise an exception instead of ending the process"),
        (("blocking_judge",), "block", "a call to blocking_judge took more than scoring.deadline = 1 s; raise "
         "scoring.deadline, or make the call faster"),
        (("judge",), "30", "a call to judge took more than scoring.deadline = 1 s; raise scoring.deadline, or make the "
         "call faster"),
        (("shady",), "hang", "a call to shady took more than scoring.deadline = 1 s; raise scoring.deadline, or make "
         "the call faster"),
    ],
)  # fmt: skip
def test_the_error_names_the_function_of_the_call(
    pool: MakePool, names: tuple[str, ...], completion: str, detail: str
) -> None:
    made = pool(*names)
    verdicts: Any = made.submit(case(completion, answer=7)).result(timeout=60)
    assert detail in [scores[0].detail for scores in verdicts]


def test_two_functions_with_one_name_are_named_with_their_files(pool: MakePool, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("def shady(completion):\n    import os\n    os._exit(4)\n")
    rewards = (f"{SHADY}:shady", f"{tmp_path}/other.py:shady")
    with closing(Pool(Setup(rewards), 1)) as made:
        verdicts: Any = made.submit(case("7", answer=7)).result(timeout=60)
    assert verdicts[0][0].value == 1.0
    assert verdicts[1][0].detail.startswith(f"the worker process ended (exit status 4) in a call to {rewards[1]}; ")


def test_variables_that_are_handed_on_are_there_and_never_shown(pool: MakePool) -> None:
    environment = {"RLORA_TEST_KEY": "secret-7f3a"}
    made = pool("with_a_key", environment=environment)
    assert values(scores(made, "secret-7f3a")) == [1.0]
    (score,) = scores(made, "guessed")
    assert "PermissionError: no access with <RLORA_TEST_KEY>; fix the function" in score.detail
    assert "secret" not in repr(Setup(environment=environment))
    (score,) = scores(pool("with_a_key"), "secret-7f3a")
    assert "KeyError: 'RLORA_TEST_KEY'" in score.detail


def test_what_fails_to_load_does_not_show_them_either(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import os\nraise ValueError('bad key ' + os.environ['RLORA_TEST_KEY'])\n")
    with pytest.raises(RloraError, match=r"ValueError: bad key <RLORA_TEST_KEY>; fix the code$"):
        Pool(Setup((f"{file}:f",), environment={"RLORA_TEST_KEY": "secret-7f3a"}), 1)
