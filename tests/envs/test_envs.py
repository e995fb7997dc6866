import json
from pathlib import Path

import datasets
import pytest
from conftest import NEEDS_SHARED, SHARED

from rlora.envs.arithmetic import Arithmetic, GradedArithmetic
from rlora.envs.gsm8k import GSM8K
from rlora.records import Prompt, RloraError


def operands(prompt: Prompt) -> frozenset[str]:
    return frozenset(word for word in str(prompt.text).rstrip("?").split() if word.isdigit())


def test_arithmetic_holds_operands_out_in_both_orders() -> None:
    env = Arithmetic(low=1, high=20)
    train, held_out = ({operands(prompt) for prompt in part} for part in (env.train(), env.held_out()))
    assert not train & held_out
    assert len(env.train()) + len(env.held_out()) == 400
    assert 0.2 < len(env.held_out()) / 400 < 0.3
    assert Arithmetic().train() == env.train()
    assert Arithmetic(seed=1).train() != env.train()


@pytest.mark.parametrize(("operator", "answer"), [("+", 7), ("-", 1), ("*", 12)])
def test_arithmetic_answers(operator: str, answer: int) -> None:
    env = Arithmetic(low=3, high=4, operator=operator, held_out_share=0.0)
    assert {prompt.text: prompt.answer for prompt in env.train()}[f"What is 4 {operator} 3?"] == answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 5, "high": 4}, "low = 5"),
        ({"held_out_share": 1.0}, "held_out_share = 1.0"),
        ({"operator": "/"}, "operator = '/'"),
    ],
)
def test_arithmetic_refuses_invalid_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        Arithmetic(**arguments)  # type: ignore[arg-type]


def test_graded_arithmetic_follows_the_rules_of_python() -> None:
    prompts = GradedArithmetic(terms="2,4", size=300).train()
    for prompt in prompts:
        assert eval(str(prompt.text).removeprefix("What is ").rstrip("?")) == prompt.answer
    assert {prompt.columns["level"] for prompt in prompts} == {1, 2, 3, 4, 5}
    assert {prompt.columns["level"] for prompt in prompts if prompt.columns["digits"] == 2} == {2, 4}


def test_graded_arithmetic_holds_out_different_problems() -> None:
    env = GradedArithmetic(digits=1, terms=2, operators="+", size=50, held_out_size=31)  # all problems
    train, held_out = ({prompt.text for prompt in part} for part in (env.train(), env.held_out()))
    assert (len(train), len(held_out), len(train | held_out)) == (50, 31, 81)
    assert GradedArithmetic(size=9).train() == GradedArithmetic(size=9).train()
    assert GradedArithmetic(size=9).train() != GradedArithmetic(size=9, seed=1).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digits": 0}, "digits = 0: use 1 to 9"),
        ({"terms": "2,x"}, "terms = '2,x'"),
        ({"operators": "+/"}, "operators = '[+]/'"),
        ({"digits": 1, "terms": 2, "operators": "+", "size": 82}, "only 81 distinct problems were found"),
    ],
)
def test_graded_arithmetic_refuses_invalid_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        GradedArithmetic(**{"held_out_size": 0} | arguments).train()  # type: ignore[arg-type]


def write(path: Path, *rows: dict[str, object]) -> str:
    for split in ("train", "test"):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_reads_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = GSM8K(write(tmp_path, {"question": "2 {x} 2?", "answer": "It is <<2*2=4>>4.\n#### 1,004"}), "Q: {question}")
    (prompt,) = env.train()
    assert prompt.text == "Q: 2 {x} 2?"
    assert prompt.answer == 1004
    assert env.held_out() == [prompt]


def test_gsm8k_reads_a_local_copy_of_the_hubs(tmp_path: Path) -> None:
    """With or without a README.md that lists its subsets."""
    for subset, answer in (("main", 4), ("socratic", 5)):
        (tmp_path / subset).mkdir()
        for split in ("train", "test"):
            row = {"question": f"{split}?", "answer": f"#### {answer}"}
            datasets.Dataset.from_list([row]).to_parquet(tmp_path / subset / f"{split}-00000-of-00001.parquet")
    for readme in (False, True):
        if readme:
            split = "  - split: {1}\n    path: {0}/{1}-*\n"
            parts = [
                f"- config_name: {subset}\n  data_files:\n{split.format(subset, 'train')}{split.format(subset, 'test')}"
                for subset in ("main", "socratic")
            ]
            (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(parts)}---\n")
        env = GSM8K(str(tmp_path), "{question}")
        assert [(prompt.text, prompt.answer) for prompt in [*env.train(), *env.held_out()]] == [
            ("train?", 4), ("test?", 4),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r"train, row 1: column 'answer' is missing \(the row has question\)"),
        ({"question": "?", "answer": "#### --4"}, r"train, row 1: answer = '#### --4' has no integer after ####"),
        ({"question": "?", "answer": "#### ²"}, r"train, row 1: answer = '#### ²' has no integer after ####"),
        ({"question": "?", "answer": None}, r"train, row 1: column 'answer' is null"),
        ({"question": "?", "answer": "four"}, r"train, row 1: answer = 'four' has no integer after ####"),
    ],
)
def test_gsm8k_names_the_row_that_is_wrong(row: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=message):
        GSM8K(write(tmp_path, {"question": "?", "answer": "#### 4"}, row))


def test_gsm8k_without_a_column_at_all(tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"row 0: column 'question' is missing \(the row has problem, answer\)"):
        GSM8K(write(tmp_path, {"problem": "?", "answer": "#### 4"}))
    with pytest.raises(RloraError, match=r"env_args\.path = .*train can't be read"):
        GSM8K(str(tmp_path / "nowhere"))
    with pytest.raises(RloraError, match=r"env_args\.template = 'Answer\.'"):
        GSM8K(str(tmp_path), template="Answer.")


@NEEDS_SHARED
def test_gsm8k_real_data() -> None:
    env = GSM8K(str(SHARED / "data" / "gsm8k"))
    assert (len(env.train()), len(env.held_out())) == (7473, 1319)
    assert env.held_out()[0].answer == 18
    assert str(env.held_out()[0].text).startswith("Janet")
