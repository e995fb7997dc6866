"""The ready tools, the env that adds tools to another env, and the search agent."""

import json
import re
from pathlib import Path

import pytest

from rlora.envs.calculator import ToolCalculator
from rlora.envs.prices import Prices
from rlora.envs.tools import Search, WithTools, calculator
from rlora.records import RloraError

ARITHMETIC = "rlora.envs.arithmetic:Arithmetic"
DOCUMENTS = ("A drum costs 42 coins in Paris.", "A lamp costs 47 coins in Paris.", "A drum costs 12 coins in Lima.")


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("drum Paris", DOCUMENTS[0]),
        ("What do drums cost in Lima?", DOCUMENTS[2]),
        ('drum" OR (NEAR * -lima', DOCUMENTS[2]),
        ("piano", "nothing found"),
        ("", "nothing found"),
        ("?!", "nothing found"),
    ],
)
def test_search_ranks_documents(query: str, first: str) -> None:
    assert Search(lambda: DOCUMENTS, 2).search(query).splitlines()[0] == first


def test_search_returns_as_many_documents_as_asked() -> None:
    assert Search(lambda: DOCUMENTS, 2).search("costs").count("\n") == 1


def test_tools_are_added_to_an_env(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    own = tmp_path / "own.py"
    own.write_text('def add(a: int, b: int) -> int:\n    """Add."""\n    return a + b\n')
    env = WithTools(
        ARITHMETIC, f"calculator, search, {own}:add", instruction="Use tools.", corpus=str(corpus), results=1,
        low=1, high=3,
    )  # fmt: skip
    compute, search, add = env.tools
    assert (compute("6*7"), search("lamp"), add(1, 2)) == ("42", DOCUMENTS[1], 3)
    prompt = next(iter(env.train()))
    assert str(prompt.text).endswith("?\nUse tools.")
    assert {p.text for p in env.train()}.isdisjoint(p.text for p in env.held_out())
    assert compute is calculator
    assert env.max_calls == 5


def test_python_runs_in_the_sandbox() -> None:
    env = WithTools(ARITHMETIC, "python", allow_python=True, characters=10)
    assert env.python("print(6 * 7)") == "42"
    assert env.python("print('a' * 99)").startswith("aaaaaaaaaa")
    assert "ZeroDivis" in env.python("1 / 0") or "Traceback" in env.python("1 / 0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": "python"}, "allow_python = false"),
        ({"tools": "python", "allow_python": True, "seconds": 0}, "seconds = 0"),
        ({"tools": "search"}, "corpus is not set"),
        ({"tools": "search", "corpus": "none.jsonl", "results": 0}, "results = 0"),
        ({"tools": "calculate"}, "env_args.tools = 'calculate'"),
        ({"tools": "calculator", "max_calls": 0}, "max_calls = 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        WithTools(ARITHMETIC, **arguments)  # type: ignore[arg-type]


def test_a_corpus_without_texts_is_an_error(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"body": "x"}\n')
    (search,) = WithTools(ARITHMETIC, "search", corpus=str(corpus)).tools
    with pytest.raises(RloraError, match="row 0: column 'text' is missing"):
        search("x")


def test_prices_can_be_looked_up_and_computed() -> None:
    env = Prices(size=50)
    search, compute = env.tools
    for prompt in env.train():
        found = search("{item} {city}".format(**prompt.columns))
        number = re.search(r"do (\d+)", prompt.text[-1]["content"])  # type: ignore[index]
        price = re.search(r"costs (\d+)", found)
        assert price is not None
        assert int(compute(f"{price[1]}*{number[1] if number else 1}")) == prompt.answer


def test_examples_are_calls_with_their_results() -> None:
    prompt = ToolCalculator(shots=1, size=1, held_out_size=0).train()[0]
    question, call, result, answer, _ = prompt.text
    assert call["tool_calls"][0]["function"] == {"name": "calculator", "arguments": {"expression": "347*28"}}  # type: ignore[index]
    assert [message["role"] for message in (question, result, answer)] == ["user", "tool", "assistant"]  # type: ignore[index]
    assert result["content"] == "9716"  # type: ignore[index]
