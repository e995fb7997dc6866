import datetime
import json
import re
from pathlib import Path

import datasets
import pytest
from conftest import NEEDS_SHARED, SHARED

from rlora.envs.competition_math import CompetitionMath, last_boxed
from rlora.envs.table import Table
from rlora.records import RloraError

ROWS = [{"q": f"What is {n}+{n}?", "a": f"so #### {2 * n}", "level": n} for n in range(10)]


def save(path: Path, rows: list[dict[str, object]] = ROWS) -> str:
    """Write rows to a file in the format of its extension. Returns its path."""
    data = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".csv":
        data.to_csv(path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_a_file_of_each_format_gives_the_same_prompts(name: str, tmp_path: Path) -> None:
    prompts = Table(save(tmp_path / name), template="{q} {{x}} \\boxed{}", answer="a", answer_after="####").train()
    assert [prompt.text for prompt in prompts[:2]] == ["What is 0+0? {x} \\boxed{}", "What is 1+1? {x} \\boxed{}"]
    assert [prompt.answer for prompt in prompts] == [str(2 * n) for n in range(10)]
    level = "3" if name == "a.csv" else 3  # all values of a CSV are text
    assert prompts[3].columns == ROWS[3] | {"level": level}


def test_a_share_is_held_out_by_seed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl")
    env, reseeded = (Table(path, prompt="q", answer="a", held_out_share=0.3, seed=seed) for seed in (0, 1))
    train, held_out = ([prompt.text for prompt in part] for part in (env.train(), env.held_out()))
    assert (len(train), len(held_out)) == (7, 3)
    assert sorted(train + held_out) == sorted(str(row["q"]) for row in ROWS)
    assert [prompt.text for prompt in reseeded.held_out()] != held_out
    assert list(Table(path, prompt="q", answer="a").held_out()) == []


def test_splits_are_the_files_of_a_directory(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl")
    save(tmp_path / "test.csv", ROWS[:2])
    env = Table(str(tmp_path), held_out_split="test", prompt="q", answer="", columns="level")
    assert (len(env.train()), len(env.held_out())) == (10, 2)
    assert [(prompt.answer, prompt.columns) for prompt in env.held_out()] == [
        (None, {"level": "0"}),
        (None, {"level": "1"}),
    ]
    with pytest.raises(RloraError, match=r"env_args\.held_out_split = 'test': .*train\.jsonl is one file"):
        Table(str(tmp_path / "train.jsonl"), held_out_split="test", prompt="q", answer="a")
    two_files = Table(str(tmp_path / "train.jsonl"), held_out_path=str(tmp_path / "test.csv"), prompt="q", answer="a")
    assert (len(two_files.train()), len(two_files.held_out())) == (10, 2)


def test_the_parquet_files_of_verl_load(tmp_path: Path) -> None:
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0},
    }
    (prompt,) = Table(save(tmp_path / "train.parquet", [row]), answer="reward_model.ground_truth").train()
    assert prompt.text == row["prompt"]
    assert prompt.answer == "4"
    assert (prompt.columns["data_source"], prompt.columns["extra_info"]) == ("openai/gsm8k", {"index": 0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "q", "answer": "b"}, r"a\.jsonl, train, row 0: column 'b' is missing \(the row has q, a, level\)"),
        ({"prompt": "q.x", "answer": "a"}, r"row 0: column 'q\.x' is missing"),
        ({"prompt": "level", "answer": "a"}, "row 0: column 'level' is 0; it must be a string or a list of chat"),
        ({"template": "{q} {x}", "answer": "a"}, "row 0: column 'x' is missing"),
        ({"prompt": "q", "answer": "a", "answer_after": "=>"}, "row 0: a = 'so #### 0' has no '=>'"),
        ({"prompt": "q", "answer": "a", "columns": "level,x"}, "row 0: column 'x' is missing"),
    ],
)
def test_table_names_the_column_and_the_row(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=message):
        Table(save(tmp_path / "a.jsonl"), **arguments).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "What?"}, "template = 'What[?]': it has no {column} placeholder"),
        ({"template": "{q} {answer}"}, "it contains the answer"),
        ({"held_out_share": 1.0}, "held_out_share = 1.0"),
        ({"held_out_share": 0.5, "held_out_split": "test"}, "already selects the held-out rows"),
        ({"held_out_split": "train"}, "it is the training data"),
    ],
)
def test_table_refuses_arguments_before_it_reads(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        Table("nowhere", **arguments)  # type: ignore[arg-type]


def test_table_names_paths_that_it_can_not_read(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(RloraError, match=r"env_args\.path = .*: train can't be read"):
            Table(path).train()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(RloraError, match=r"its extension is '\.txt'"):
        Table(str(tmp_path / "a.txt")).train()


def math(tmp_path: Path, **arguments: object) -> CompetitionMath:
    train = [
        {"problem": "1+1?", "answer": "2", "level": "Level 1", "type": "Algebra"},
        {"problem": "1+2?", "solution": "It is \\boxed{\\frac{6}{2}}.", "level": "Level 5", "type": "Geometry"},
        {"problem": "Lost?", "answer": None, "level": "Level 5", "type": "Geometry"},
    ]
    test = [{"problem": "2+2?", "answer": "4", "level": 5, "subject": "Algebra"}]
    paths = save(tmp_path / "a.jsonl", train), save(tmp_path / "b.jsonl", test)
    return CompetitionMath(*paths, **arguments)  # type: ignore[arg-type]


def test_math_reads_either_kind_of_rows_and_leaves_out_those_without_an_answer(tmp_path: Path) -> None:
    env = math(tmp_path)
    assert [prompt.answer for prompt in env.train()] == ["2", "\\frac{6}{2}"]
    assert [(prompt.columns["level"], prompt.columns["subject"]) for prompt in env.train()] == [
        (1, "Algebra"), (5, "Geometry"),
    ]  # fmt: skip
    (held_out,) = env.held_out()
    assert held_out.text == "2+2?\nReason step by step, and put the answer into \\boxed{}."


def test_math_chooses_by_level_and_subject(tmp_path: Path) -> None:
    assert [prompt.answer for prompt in math(tmp_path, levels="4,5").train()] == ["\\frac{6}{2}"]
    assert [prompt.answer for prompt in math(tmp_path, levels=1).train()] == ["2"]
    assert [prompt.answer for prompt in math(tmp_path, subjects="Algebra").train()] == ["2"]
    with pytest.raises(RloraError, match="no problem is left"):
        math(tmp_path, levels=3).train()
    with pytest.raises(RloraError, match="levels = '6': '6' is not one of 1, 2"):
        math(tmp_path, levels="6")
    with pytest.raises(RloraError, match="subjects = 'Algbra'"):
        math(tmp_path, subjects="Algbra")
    with pytest.raises(RloraError, match="template = 'Go'"):
        math(tmp_path, template="Go")


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{1} and \\boxed{\\sqrt{2}}.", "\\sqrt{2}"),
        ("\\fbox{3}", "3"),
        ("\\boxed{1", None),
        ("none", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@NEEDS_SHARED
def test_math_real_data() -> None:
    env = CompetitionMath(str(SHARED / "data" / "math_train"), str(SHARED / "data" / "math500"))
    train, held_out = env.train(), env.held_out()
    assert (len(train), len(held_out)) == (7472, 500)
    assert (train[0].answer, train[0].columns["level"], train[0].columns["subject"]) == ("0", 5, "Algebra")
    assert held_out[0].answer == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}


def read_prompt(tmp_path: Path, prompt: object, name: str = "chat.jsonl") -> object:
    """The prompt text that Table reads from a JSON Lines file with this prompt column."""
    (tmp_path / name).write_text(json.dumps({"prompt": prompt, "answer": "4"}) + "\n")
    (row,) = Table(str(tmp_path / name)).train()
    return row.text


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}


@pytest.mark.parametrize(
    "prompt",
    [
        [SYSTEM, USER],
        [SYSTEM | {"name": "x", "tool_calls": None}, USER],
        [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}],
        [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "2+2?", "image_url": None}]}],
        [SYSTEM, {"role": "user", "content": [{"text": "2+2?"}]}],
        [SYSTEM, {"role": "user", "content": ["2+", "2?"]}],
        [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+2?"}],
        [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "2+2?"}],
        json.dumps([SYSTEM, USER]),
        "\n " + json.dumps([SYSTEM, USER], indent=1),
        str([SYSTEM, USER]),  # written by pandas to a CSV
        json.dumps([{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+2?"}]),
        json.dumps({"messages": [SYSTEM, USER]}),
        json.dumps({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+2?"}]}),
        {"messages": [SYSTEM, USER], "tools": None},
        json.dumps(json.dumps([SYSTEM, USER])),
        json.dumps({"messages": json.dumps([SYSTEM, USER])}),
        json.dumps([json.dumps(SYSTEM), json.dumps(USER)]),
        str((SYSTEM, USER)),
        repr(str([SYSTEM, USER])),
        '[{"content": "Be brief.", "role": "system"}, {"id": 7, "content": "2+2?", "role": "user"}]',
        [SYSTEM, {"role": "user", "content": json.dumps([{"type": "text", "text": "2+2?"}])}],
        [SYSTEM, {"role": "user", "content": json.dumps(json.dumps([{"type": "text", "text": "2+2?"}]))}],
        [SYSTEM, {"role": "user", "content": str([{"type": "text", "text": "2+"}, {"text": "2?", "type": "text"}])}],
        [SYSTEM, {"role": "user", "content": '{"type": "text", "text": "2+2?"}'}],
    ],
)
def test_chat_messages_in_each_usual_form(prompt: object, tmp_path: Path) -> None:
    assert read_prompt(tmp_path, prompt) == [SYSTEM, USER]


TEXTS = [
    "[1, 2]", '[{"a": 1}]', "[{", "{}", "[{x}]", "[]", '[{"role"', "{[1]: 2}", '"2+2?"', "null", '{"text": "a"}',
    'Here is a chat: [{"role": "user", "content": "hi"}]. Who speaks?',
    '[{"role": "user", "content": "hi"}]\nWho speaks in this chat?',
    "[{'role': 'user', 'content': 'hi'}] is a list ] of Python. How long is it?",
    '{"role": "user", "content": "hi"} is JSON. Which keys has it?',
    "Fix this: [{'role': 'user', 'content': 'hi'} {'role': 'user'}]",
    '[{"from": "Paris", "to": "Rome"}]', '{"role": "admin", "name": "x"}', '{"from": "Paris", "value": ',
    '{"content": "abc"}', '{"messages": 3}', '{"value": 4', '[{"type": "circle", "radius": 3}]', "array([1, 2])",
    '"Quoted," he said. "role": no.',
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_is_no_chat_stays_as_it_is(text: str, tmp_path: Path) -> None:
    assert read_prompt(tmp_path, text) == text


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS[:8],
        '[{"type": "text", "size": 3}]',
        '{"type": "file", "name": "a"}',
        '[{"type": "file", "path": "a"}]',
        '[{"type": "circle", "radius": 3}]',
        '[{"text": "a"}]',
        '[{"type": 3}]',
    ],
)
def test_a_content_that_is_no_list_of_parts_stays_as_it_is(text: str, tmp_path: Path) -> None:
    assert read_prompt(tmp_path, [{"role": "user", "content": text}]) == [{"role": "user", "content": text}]


def test_one_message_is_a_chat(tmp_path: Path) -> None:
    for prompt in (USER, json.dumps(USER), str(USER), {"from": "human", "value": "2+2?"}, json.dumps(json.dumps(USER))):
        assert read_prompt(tmp_path, prompt) == [USER]


def test_a_line_break_inside_a_json_string_is_read(tmp_path: Path) -> None:
    assert read_prompt(tmp_path, '[{"role": "user", "content": "a\nb"}]') == [{"role": "user", "content": "a\nb"}]


def test_sharegpt_calls_and_observations_are_the_assistants_and_the_tools(tmp_path: Path) -> None:
    turns = [("human", "Weather?"), ("function_call", '{"name": "weather"}'), ("observation", "sunny")]
    assert read_prompt(tmp_path, [{"from": role, "value": text} for role, text in turns]) == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}],
        },
        {"role": "tool", "content": "sunny"},
    ]


@pytest.mark.parametrize("value", ["weather", '{"city": "Rome"}', "[1]", ""])
def test_a_sharegpt_call_that_is_none_is_refused(value: str, tmp_path: Path) -> None:
    turns = [("human", "Weather?"), ("function_call", value), ("observation", "sunny")]
    with pytest.raises(RloraError, match=r"message 1.*\{\"name\": \.\.\."):
        read_prompt(tmp_path, [{"from": role, "value": text} for role, text in turns])


def test_thoughts_stay_beside_the_answer(tmp_path: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "4", "reasoning": "2 and 2", "thinking": None}, USER]
    assert read_prompt(tmp_path, turns)[1] == {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}


UNREADABLE = [
    "[{'role': 'system', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]",  # written by to_csv from verl's parquet
    "[{'content': 'a', 'role': 'system'}\n {'content': 'b', 'role': 'user'}]",
    "array([{'role': 'user', 'content': 'b'}], dtype=object)",
    "array([{'content': 'b', 'role': 'user'}],\n      dtype=object)",
    "[array([{'role': 'user', 'content': 'b'}], dtype=object)]",
    "[{'from': 'human', 'value': 'a'}\n {'from': 'gpt', 'value': 'b'}]",
    '[{"role": "user", "content": "trunc',
    '[{"role": ',
    '{"role": "user", "content": "trunc',
    '{"messages": [{"role": "user", "con',
    '"[{\\"role\\": \\"user\\", \\"con',
    '[{"content": "trunc',
    '[{"from": "human", "val',
    '{"role": "user", "content": "a"}\n{"role": "user", "content": "b"}',
    "[{'role': f()}]",
    "[{'role': 'user', 'content': array([{'type': 'text', 'text': 'b'}], dtype=object)}]",
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_chat_in_a_string_that_can_not_be_read_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(
        RloraError, match=r"chat\.jsonl, train, row 0: column 'prompt' begins like chat messages"
    ) as refused:
        read_prompt(tmp_path, text)
    assert re.search(
        r"neither JSON nor a Python literal.*json\.dumps, or save the table as parquet", str(refused.value)
    )


def test_a_chat_in_the_second_row_is_refused_by_its_number(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", [{"prompt": "2+2?", "answer": ""}, {"prompt": UNREADABLE[0], "answer": ""}])
    with pytest.raises(RloraError, match=r"a\.jsonl, train, row 1: column 'prompt' begins like chat"):
        Table(path).train()


@pytest.mark.parametrize(
    "text", ["[{'type': 'text', 'text': 'a'}\n {'type': 'text', 'text': 'b'}]", '[{"type": "text", "te']
)
def test_a_content_in_a_string_that_can_not_be_read_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"row 0: column 'prompt', message 0: content begins like a list of parts"):
        read_prompt(tmp_path, [{"role": "user", "content": text}])


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([SYSTEM, {"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}],
         r"row 0: column 'prompt', message 1: content has a part .*image_url.*, but only text is supported"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"message 0: content has a part \{'type': 'image'\}"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], r"message 0: content has a part"),
        ([{"role": "user", "content": [7]}], r"message 0: content has a part 7"),
        ([{"role": "user", "content": None}], r"message 0: content is None; it must be a string"),
        ([{"role": "user", "content": 4}], r"message 0: content is 4; it must be a string"),
        ([{"role": "user"}], r"message 0: content is None"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "4"}],
         r"message 1: \{'id': '1'\} in tool_calls is not a call; use"),
        ([{"from": "robot", "value": "hi"}], r"message 0: from = 'robot' is not one of human, user, .*; rename it"),
        ([{"from": "human", "value": None}], r"message 0: content is None"),
        ([{"role": 3, "content": "a"}], r"message 0 is .*; it must have a role, a string"),
        ([USER, {"role": "assistant", "content": "4"}], r"last message is the assistant's, '4', .*drop the last"),
        ([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], r"its last message is the assistant's"),
        (json.dumps([{"role": "user", "content": [IMAGE]}]), r"message 0: content has a part .*image_url"),
        ([], r"is \[\]; it must be a string or a list of chat messages"),
        (["a"], r"is \['a'\]; it must be"),
        ({"a": "b"}, r"it must be a string or a list of chat messages"),
        ([[USER]], r"it must be a string or a list of chat messages"),
        (json.dumps([[USER]]), r"it must be a string or a list of chat messages"),
        (json.dumps([USER, {"text": "a"}]), r"message 1 is .*; it must have a role"),
        (json.dumps([{"type": "text", "text": "a"}]), r"message 0 is .*; it must have a role"),
        (json.dumps({"messages": [USER], "tools": [{"name": "f"}]}), r"has tools next to messages, .*drop"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, r"has tools next to messages"),
        ([{"role": "user", "content": json.dumps([{"type": "text", "text": "a"}, IMAGE])}],
         r"message 0: content has a part .*image_url"),
        ([{"role": "user", "content": json.dumps([IMAGE])}], r"message 0: content has a part .*image_url"),
        ([USER, {"from": "function_response", "value": "4"}], r"message 1: from = 'function_response' is not one of"),
    ],
)  # fmt: skip
def test_invalid_chat_messages_are_refused_with_row_and_column(prompt: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"chat\.jsonl, train, row 0: column 'prompt'") as refused:
        read_prompt(tmp_path, prompt)
    assert re.search(message, str(refused.value))


def test_a_missing_value_is_refused_if_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "a", "a": NaN, "x": null}\n')
    (row,) = Table(str(path), prompt="q", answer="", columns="q").train()
    assert row.columns == {"q": "a"}
    with pytest.raises(RloraError, match=r"row 0: column 'a' is NaN; fix or drop the row"):
        Table(str(path), prompt="q", answer="a").train()
    with pytest.raises(RloraError, match=r"row 0: column 'x' is null"):
        Table(str(path), template="{x}", answer="").train()


def test_a_local_copy_of_math_by_subject(tmp_path: Path) -> None:
    subjects = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
    for subject in subjects.split():
        (tmp_path / "math" / subject).mkdir(parents=True)
        row = {"problem": f"{subject}?", "solution": "It is \\boxed{4}.", "level": "Level 3", "type": "Algebra"}
        save(tmp_path / "math" / subject / "train-00000-of-00001.parquet", [row])
    prompts = CompetitionMath(str(tmp_path / "math"), template="{problem}").train()
    assert [prompt.text for prompt in prompts] == [f"{subject}?" for subject in subjects.split()]
    assert {prompt.answer for prompt in prompts} == {"4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out_split": "test"}, r"held_out_split = 'test': .* holds one split, as save_to_disk wrote it; "),
        ({"split": "test", "held_out_split": "train"}, r"held_out_split = 'train': .* holds one split"),
        ({"split": "train[:50%]", "held_out_split": "test[50%:]"}, r"holds one split"),
        ({"held_out_path": "{}/../one"}, r"it is the training data"),
    ],
)
@pytest.mark.parametrize("split", ["test", "train", None])
def test_one_split_that_was_saved_can_not_be_two(
    split: str | None, arguments: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "one")
    datasets.Dataset.from_dict({"prompt": list("abcd"), "answer": list("1234")}, split=split).save_to_disk(path)
    with pytest.raises(RloraError, match=message):
        Table(path, **{name: value.format(path) for name, value in arguments.items()})  # type: ignore[arg-type]
    env = Table(path, split="train[:50%]", held_out_split="train[50%:]")
    assert [prompt.text for prompt in env.train()] == ["a", "b"]
    assert [prompt.text for prompt in env.held_out()] == ["c", "d"]


@pytest.mark.parametrize("path", ["train.jsonl", ""])
def test_a_slice_can_be_held_out(path: str, tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl")
    env = Table(
        str(tmp_path / path),
        split="train[:8]",
        held_out_split="train[80%:]",
        prompt="level",
        template="{level}",
        answer="",
    )
    assert [prompt.text for prompt in env.train()] == list("01234567")
    assert [prompt.text for prompt in env.held_out()] == ["8", "9"]


@pytest.mark.parametrize(
    ("split", "held_out_split", "shared"),
    [
        ("train", "train[:2]", "rows 0 to 1 of train"),
        ("train[:8]", "train[50%:]", "rows 5 to 7 of train"),
        ("train+test", "test", "rows 0 to 1 of test"),
        ("test", "train[:1]+test[-1:]", "rows 1 to 1 of test"),
    ],
)
def test_rows_of_both_parts_are_refused(split: str, held_out_split: str, shared: str, tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl")
    save(tmp_path / "test.jsonl", ROWS[:2])
    env = Table(str(tmp_path), split=split, held_out_split=held_out_split, prompt="q", answer="a")
    for part in (env.train, env.held_out):
        with pytest.raises(
            RloraError, match=rf"{shared} are also in .*; train on one slice and hold out a different one"
        ):
            part()


@pytest.mark.parametrize(
    ("value", "text"),
    [("true", "true"), ("false", "false"), ("1.50", "1.50"), ("1e5", "1e5"), ("-7", "-7"), ('"007"', "007")],
)
def test_a_template_keeps_the_text_of_the_file(value: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"v": {value}, "n": {{"v": {value}}}}}\n')
    (row,) = Table(str(tmp_path / "a.jsonl"), template="Is {v}, {n.v}?", answer="").train()
    assert row.text == f"Is {text}, {text}?"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"role": "user", "content": "hi"}], r"column 'v' holds chat messages.* set env_args\.prompt = 'v' and drop"),
        ({"a": 1}, r"column 'v' holds an object, \{'a': 1\}.* name a column inside it, as \{v\.a\}"),
        (["a", "b"], r"column 'v' holds a list, \['a', 'b'\].* write its text into a column"),
        ([1, 2], r"column 'v' holds a list, \[1, 2\]"),
        ([], r"column 'v' holds a list, \[\]"),
    ],
)
def test_a_template_refuses_values_other_than_text_and_numbers(value: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"v": value}) + "\n")
    with pytest.raises(RloraError, match=rf"a\.jsonl, train, row 0: {message}"):
        Table(str(tmp_path / "a.jsonl"), template="Solve: {v}", answer="").train()


def test_a_template_takes_dates_of_parquet_and_refuses_bytes(tmp_path: Path) -> None:
    row = {"day": datetime.date(2024, 1, 31), "raw": b"x", "on": True}
    path = save(tmp_path / "a.parquet", [row])
    assert [prompt.text for prompt in Table(path, template="{day} {on}", answer="").train()] == ["2024-01-31 true"]
    with pytest.raises(RloraError, match=r"row 0: column 'raw' holds bytes, b'x'"):
        Table(path, template="{raw}", answer="").train()
