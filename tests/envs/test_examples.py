"""Data sets of given completions, in the column forms of TRL, and the groups that they become."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import episode, group, write_provenance
from upath import UPath

from rlora.envs.episodes import RunEpisodes
from rlora.envs.examples import Examples
from rlora.model.base import locate
from rlora.plugin import register
from rlora.records import Episode, Kept, Messages, Prompt, RloraError
from rlora.rollout.cursor import Cursor
from rlora.rollout.examples import Examples as Stream
from rlora.rollout.given import example_of
from rlora.rollout.task import bare_task, load_task
from rlora.run import episodes
from rlora.run.checkpoint import Bundle, bundle_path
from rlora.settings import Config
from rlora.store import write_directory


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TWICE = {"chosen": [user("2 + 2?"), assistant("4")], "rejected": [user("2 + 2?"), assistant("5")]}
EQUAL = {"chosen": [user("a"), assistant("4")], "rejected": [user("a"), assistant("4")]}
SETS = {"name": "f", "arguments": {"a": {1}}}  # not JSON
ASKED = [{"role": "system", "content": "Be brief."}, user("2 + 2?")]


@pytest.mark.parametrize(
    ("row", "text", "completions"),
    [
        ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?", ("4",)),
        ({"prompt": ASKED, "completion": [assistant("4")]}, ASKED, ((assistant("4"),),)),
        ({"messages": [*ASKED, assistant("4")]}, ASKED, ((assistant("4"),),)),
        (
            {"messages": [user("2 + 2?"), assistant("4"), user("Sure?"), assistant("Yes.")]},
            [user("2 + 2?")],
            ((assistant("4"), user("Sure?"), assistant("Yes.")),),
        ),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            [user("2 + 2?")],
            ((assistant("4"),),),
        ),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, "2 + 2?", ("4", "5")),
        ({"prompt": "a", "completion": "b", "chosen": None, "rejected": None, "messages": None}, "a", ("b",)),
        ({"prompt": None, "completion": None, "text": "b"}, (), ("b",)),
        ({"prompt": "2 + 2?", "completion": [user("2 + 2?"), assistant("4")]}, "2 + 2?", ((assistant("4"),),)),
        (
            {"prompt": ASKED, "chosen": [assistant("4")], "rejected": [assistant("5")]},
            ASKED,
            ((assistant("4"),), (assistant("5"),)),
        ),
        (  # as ultrafeedback_binarized has it: the prompt once more in both conversations
            {
                "prompt": "2 + 2?",
                "chosen": [user("2 + 2?"), assistant("4")],
                "rejected": [user("2 + 2?"), assistant("5")],
            },
            "2 + 2?",
            ((assistant("4"),), (assistant("5"),)),
        ),
        (
            {"chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("5")]},
            ASKED,
            ((assistant("4"),), (assistant("5"),)),
        ),
        (  # alike up to the second answer
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
            },
            [user("a"), assistant("b"), user("c")],
            ((assistant("d"),), (assistant("e"),)),
        ),
    ],
)
def test_the_column_forms_of_trl(row: Any, text: str | Messages, completions: tuple[Any, ...], tmp_path: Path) -> None:
    (prompt,) = Examples(write(tmp_path / "a.jsonl", [row])).train()
    assert prompt.text == text
    assert prompt.completions == completions


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "2 + 2?", "completion": " "}, "row 0: column 'completion' is empty"),
        ({"prompt": "2 + 2?", "completion": None}, "row 0: column 'completion' is null"),
        ({"completion": "4"}, "row 0: column 'prompt' is missing"),
        ({"messages": ASKED}, "row 0: column 'messages' has no message of the assistant"),
        ({"messages": [assistant("4")]}, "row 0: column 'messages' has no message of the assistant after"),
        ({"messages": [*ASKED, assistant("4"), user("?")]}, "row 0: column 'messages' ends with a message of user"),
        ({"prompt": "2 + 2?", "chosen": "4"}, "row 0: column 'rejected' is missing"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": ""}, "row 0: column 'rejected' is empty"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}, "row 0: chosen and rejected are the same"),
        ({"chosen": "4", "rejected": "5"}, "row 0: chosen and rejected are text without a prompt"),
        (
            {"chosen": [user("a"), assistant("4")], "rejected": [user("b"), assistant("5")]},
            "row 0: chosen and rejected do not share a prompt",
        ),
        (
            {"chosen": [user("a"), assistant("4")], "rejected": [user("a"), assistant("4")]},
            "chosen and rejected are the same",
        ),
        (
            {"prompt": "a", "chosen": [user("a"), assistant("4")], "rejected": [user("b"), assistant("5")]},
            "row 0: column 'rejected' begins with a different prompt, 'b'",
        ),
        (
            {"question": "a", "answer": "b"},
            "row 0: it has the columns question, answer; an example needs",
        ),
        ({"prompt": "a", "completion": [user("b"), assistant("c")]}, "row 0: column 'completion' begins with a diff"),
        ({"messages": None, "text": None}, "row 0: column 'messages' is null"),
        ({"text": 4}, "row 0: column 'text' is 4; it must be text"),
        ({"prompt": "2 + 2?", "text": "4"}, "row 0: it has a prompt and a text, and no completion"),
        ({"prompt": "2 + 2?", "completion": None, "text": "4"}, r"and no completion; set env_args\.completion"),
        ({"text": 4}, r"line 1 of \S*a\.jsonl, train, row 0: column 'text'"),
        ({"messages": [assistant("a"), user("b"), assistant("c")]}, "begins with the assistant's message, which"),
        ({"messages": [user("a"), {"role": "model", "content": "b"}]}, r"\(roles: user, model\)"),
        ({"system": "Be brief.", "messages": [user("a"), assistant("b")]}, "column 'system' is not read; put its text"),
        ({"images": ["a.png"], "prompt": "a", "completion": "b"}, "column 'images' is not read; only text"),
        ({"messages": [user("a"), {**assistant(""), "tool_calls": [{"name": "", "arguments": {}}]}]}, "is not a call"),
        (
            {"messages": [user("a"), {**assistant(""), "tool_calls": [{"name": "f", "arguments": '{"x": NaN}'}]}]},
            "is not a call",
        ),
        *(
            ({"messages": [user("a"), {**assistant(""), "tool_calls": [{"name": "f", **fields}]}]}, "is not a call")
            for fields in ({"args": {"x": 1}}, {"input": {"x": 1}}, {"arguments": []}, {"arguments": "null"})
        ),
        ({"messages": [user("a"), {**assistant("b"), "weight": 2}]}, "message 1: weight = 2 of a message; use 0 or 1"),
    ],
)
def test_rows_that_are_no_examples_say_where_and_why(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=message):
        Examples(write(tmp_path / "a.jsonl", [row])).train()


def test_the_prompt_of_a_named_column_is_not_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "2 + 2?", "text": "4"}])
    with pytest.raises(RloraError, match="it has a prompt and a text"):
        Examples(path, prompt="question").train()
    (prompt,) = Examples(path, prompt="question", completion="text").train()
    assert (prompt.text, prompt.completions) == ("2 + 2?", ("4",))


def test_tools_as_json_keep_their_nulls(tmp_path: Path) -> None:
    """Unlike those in objects, to which Arrow adds nulls."""
    schema = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string", "default": None}}}}
    rows = [{"prompt": "a", "completion": "b", "tools": tools} for tools in (json.dumps([schema]), [schema])]
    kept, cut = Examples(write(tmp_path / "a.jsonl", rows)).train()
    assert kept.tools == (schema,)
    assert cut.tools[0]["parameters"]["properties"] == {"x": {"type": "string"}}


def test_columns_can_have_other_names_and_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "2 + 2?", "solution": "4", "w": 2}])
    (prompt,) = Examples(path, prompt="question", completion="solution", weight="w").train()
    assert (prompt.text, prompt.completions, prompt.weight) == ("2 + 2?", ("4",), 2.0)
    (tmp_path / "a.csv").write_text("question,solution,w\n2 + 2?,4,0.5\n")
    (prompt,) = Examples(str(tmp_path / "a.csv"), prompt="question", completion="solution", weight="w").train()
    assert prompt.weight == 0.5
    nested = write(tmp_path / "b.jsonl", [{"question": "2 + 2?", "extra": {"solution": "4"}, "text": "a"}])
    (prompt,) = Examples(nested, prompt="question", completion="extra.solution").train()
    assert prompt.completions == ("4",)
    with pytest.raises(RloraError, match="row 0: column 'ask' is missing"):
        Examples(path, prompt="ask", completion="solution").train()
    with pytest.raises(RloraError, match="row 0: column 'answer' is missing"):
        Examples(nested, prompt="question", completion="answer").train()
    with pytest.raises(RloraError, match=r"held_out_share = 0\.1: less than one of 1 rows"):
        Examples(path, prompt="question", completion="solution", held_out_share=0.1).train()


def test_messages_of_weight_0_are_read_and_not_learned_from(supervised: Callable[..., Config], tmp_path: Path) -> None:
    messages = [user("2 + 2?"), {**assistant("5"), "weight": 0}, user("Sure?"), {**assistant("4"), "weight": 1}]
    (prompt,) = Examples(write(tmp_path / "a.jsonl", [{"messages": messages}])).train()
    made = supervised(sampling={"max_tokens": 64, "max_prompt_tokens": 64})
    chat = bare_task(made).chat
    (example,) = example_of(prompt, chat, made, 0).episodes
    learned = [token for token, own in zip(example.completion_ids, example.sampled_mask, strict=True) if own]
    assert chat.decode(learned) == "4<|im_end|>"
    assert chat.decode(example.completion_ids).startswith("5<|im_end|>")
    with pytest.raises(RloraError, match=r"row 7: every answer of the completion has the weight 0; drop the row"):
        example_of(Prompt("?", completions=([messages[1]],), source="row 7"), chat, made, 0)
    path = write(tmp_path / "b.jsonl", [{"prompt": "2 + 2?", "completion": "4", "w": -1}])
    with pytest.raises(RloraError, match=r"row 0: column 'w' is -1; use a number of 0 or more"):
        Examples(path, weight="w").train()


@pytest.fixture
def supervised(config: Callable[..., Config]) -> Callable[..., Config]:
    def make(**changes: Any) -> Config:
        return config(**{"reward": "", "env": "rlora.envs.examples:Examples", "algorithm": {"name": "sft"}} | changes)

    return make


def test_a_completion_has_the_tokens_that_the_policy_would_sample(supervised: Callable[..., Config]) -> None:
    made = supervised(sampling={"max_tokens": 99, "max_prompt_tokens": 99})
    chat = bare_task(made).chat
    turns = [user("2 + 2?"), assistant("4"), user("Sure?"), assistant("Yes.")]
    example = example_of(Prompt(turns[:1], completions=(turns[1:],)), chat, made, 0)
    (episode,) = example.episodes
    whole = chat.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    ids = [*example.prompt.token_ids, *episode.completion_ids]
    assert ids == list(whole)[: len(ids)]  # the template ends with a line break, which nobody samples
    assert chat.decode(whole[len(ids) :]).strip() == ""
    learned = [token for token, own in zip(episode.completion_ids, episode.sampled_mask, strict=True) if own]
    assert chat.decode(learned) == "4<|im_end|>Yes.<|im_end|>"
    assert set(episode.behaviour_logprobs) == {0.0}


def test_bad_lengths_and_counts_say_what_to_do(supervised: Callable[..., Config]) -> None:
    made = supervised(sampling={"max_tokens": 8, "max_prompt_tokens": 48})
    chat = bare_task(made).chat
    long = " ".join(["word"] * 60)
    with pytest.raises(RloraError, match=r"example 3: its completion has 6\d tokens, but sampling\.max_tokens = 8"):
        example_of(Prompt("a", completions=(long,)), chat, made, 3)
    with pytest.raises(RloraError, match=r"a\.jsonl, row 7: its prompt has \d+ tokens, but sampling\.max_prompt"):
        example_of(Prompt(long, completions=("a",), source="a.jsonl, row 7"), chat, made, 3)
    with pytest.raises(RloraError, match=r"it has 2 completions, but algorithm\.loss = 'sft' learns from one"):
        example_of(Prompt("a", completions=("b", "c")), chat, made, 0)
    with pytest.raises(RloraError, match=r"it has 0 completions, but algorithm\.loss = 'dpo' learns from a chosen"):
        example_of(Prompt("a"), chat, supervised(algorithm={"name": "dpo"}), 0)


@pytest.fixture
def recorded(tmp_path: Path, bundle: Callable[..., Bundle]) -> str:
    """A run with two updates, on a prompt with two right and two wrong completions and on one with right ones only."""
    write_provenance(tmp_path)
    for version in range(3):
        first = group([5, 6], *(episode([7 + n, version], float(n < 2), [-0.5, -1.5]) for n in range(4)))
        second = group([8], episode([9, 9], 1.0), episode([9, 9], 1.0))
        update = episodes.encode([first, second]) if version else None
        made = replace(bundle(version), update=update)
        write_directory(bundle_path(UPath(tmp_path), version), made.files)
    return str(tmp_path)


def test_the_episodes_of_a_run_become_pairs_or_single_examples(recorded: str) -> None:
    pairs = RunEpisodes(recorded, pairs=True, most=9).train()
    assert len(pairs) == 4  # two steps, two pairs each
    for prompt in pairs:
        right, wrong = prompt.completions
        assert isinstance(right, Episode)
        assert isinstance(wrong, Episode)
        assert right.completion_ids[0] in (7, 8)
        assert wrong.completion_ids[0] in (9, 10)
        assert right.completion_ids[1] == wrong.completion_ids[1]  # of the same step
    assert [prompt.source for prompt in pairs] == [f"{recorded}, step {step}" for step in (0, 0, 1, 1)]
    single = RunEpisodes(recorded).train()
    assert [len(prompt.completions) for prompt in single] == [1] * 4
    assert len(RunEpisodes(recorded, most=2, steps=1).train()) == 3  # equal completions count once
    half = RunEpisodes(recorded, held_out_share=0.5)
    assert {p.token_ids for p in half.train()} | {p.token_ids for p in half.held_out()} == {(5, 6), (8,)}
    assert not {p.token_ids for p in half.train()} & {p.token_ids for p in half.held_out()}


def test_sampled_tokens_are_learned_from_as_they_are(recorded: str, supervised: Callable[..., Config]) -> None:
    made = supervised(algorithm={"name": "dpo"})
    (prompt, *_) = RunEpisodes(recorded, pairs=True).train()
    example = example_of(prompt, bare_task(made).chat, made, 0)
    assert example.prompt.token_ids == (5, 6)
    assert [e.completion_ids for e in example.episodes] == [
        e.completion_ids for e in prompt.completions if isinstance(e, Episode)
    ]
    assert example.rewards == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"most": "2"}, "most = '2': use an integer"), ({"steps": -1}, "steps = -1: use an integer of 0"),
     ({"threshold": "1"}, "threshold = '1': use a number"), ({"held_out_share": 0.1}, "less than one of 2 rows")],
)  # fmt: skip
def test_arguments_of_a_run_are_checked(recorded: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        RunEpisodes(recorded, **arguments).train()


def test_examples_whose_weights_are_all_0_are_refused(supervised: Callable[..., Config], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "w": 0}] * 2)
    with pytest.raises(RloraError, match="the weights of all examples are 0"):
        load_task(supervised(env="rlora.envs.examples:Examples", env_args={"path": path, "weight": "w"}))


def test_a_run_without_fitting_episodes_is_refused(recorded: str, tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"its bundles have no right completion \(threshold 2\)"):
        RunEpisodes(recorded, threshold=2).train()
    with pytest.raises(RloraError, match="not the directory of a run with bundles"):
        RunEpisodes(str(tmp_path / "nowhere")).train()


def test_each_epoch_visits_all_examples_and_a_resumed_stream_continues(
    supervised: Callable[..., Config], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}?", "completion": str(n)} for n in range(5)]
    made = supervised(env_args={"path": write(tmp_path / "a.jsonl", rows), "held_out_share": 0.2}, prompts_per_step=3)
    task = load_task(made)
    assert (len(task.examples), len(task.held_out_examples), len(task.prompts)) == (4, 1, 4)
    stream = Stream(made, task.examples, Cursor())
    seen = [group.prompt.text for step in range(4) for group in stream.take(step).groups]
    assert all(
        sorted(map(str, seen[n : n + 4])) == sorted(str(g.prompt.text) for g in task.examples) for n in (0, 4, 8)
    )
    resumed = Stream(made, task.examples, Cursor(next=6))
    assert [group.prompt.text for group in resumed.take(2).groups] == seen[6:9]
    assert resumed.cursor == Cursor(9)


def test_a_text_is_learned_from_as_it_is(supervised: Callable[..., Config], tmp_path: Path) -> None:
    config = supervised(sampling={"max_tokens": 40, "max_prompt_tokens": 8})
    chat = bare_task(config).chat
    (prompt,) = Examples(write(tmp_path / "a.jsonl", [{"text": "Two and two is four."}])).train()
    made = example_of(prompt, chat, config, 0)
    ids = made.prompt.token_ids + made.episodes[0].completion_ids
    assert chat.decode(ids[:-1]) == "Two and two is four."
    assert ids[-1] in chat.stop_token_ids
    assert len(made.prompt.token_ids) == 1
    (loaded,) = load_task(replace(config, env_args={"path": str(tmp_path / "a.jsonl")})).examples
    assert (loaded.prompt.token_ids, loaded.episodes[0].completion_ids) == (ids[:1], ids[1:])


CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
SCHEMA = {
    "type": "function",
    "function": {"name": "now", "description": "Tell the time.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    ("call", "tools"),
    [
        (CALL, [SCHEMA]),
        (CALL | {"function": {"name": "now", "arguments": '{"zone": "UTC"}'}}, json.dumps([SCHEMA])),
        (CALL | {"function": {"name": "now", "arguments": {"zone": "UTC", "unit": None}}}, [SCHEMA | {"strict": None}]),
        ({"name": "now", "arguments": {"zone": "UTC"}}, [SCHEMA]),
    ],
)
def test_conversations_with_tool_calls(
    call: object, tools: object, supervised: Callable[..., Config], tmp_path: Path
) -> None:
    messages = [
        user("What time is it?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "now", "tool_call_id": "c1", "content": "12:00"},
        assistant("Noon."),
    ]
    env = Examples(write(tmp_path / "a.jsonl", [{"messages": messages, "tools": tools}]))
    (prompt,) = env.train()
    config = supervised(chat={"template": "hermes"}, sampling={"max_tokens": 99, "max_prompt_tokens": 200})
    chat = bare_task(config).chat
    (episode,) = example_of(prompt, chat, config, 0).episodes
    learned = [token for token, own in zip(episode.completion_ids, episode.sampled_mask, strict=True) if own]
    assert chat.decode(learned) == (
        '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>Noon.<|im_end|>'
    )
    rendered = chat.decode(chat.prompt_ids(prompt.text, prompt.tools) + episode.completion_ids)
    assert "Tell the time." in rendered
    assert rendered.endswith(
        "<tool_response>\n12:00\n</tool_response><|im_end|>\n<|im_start|>assistant\nNoon.<|im_end|>"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "tools": "["}, "row 0: column 'tools' is not valid JSON"),
        ({"prompt": "a", "completion": "b", "tools": 4}, "row 0: column 'tools' is 4; it must be a list"),
        (
            {"prompt": "a", "completion": "b", "tools": [{"name": 4}]},
            "row 0: .*'name': 4.* is not the schema of a tool",
        ),
        ({"prompt": "a", "completion": "b", "tools": ["now"]}, "row 0: 'now' is not the schema of a tool"),
        (
            {"prompt": "a", "completion": "b", "tools": [{"name": "f", "parameters": {"x": {"type": "str"}}}]},
            "row 0: tool 'f': its parameters .* are not a JSON schema of an object",
        ),
    ],
)
def test_tools_that_are_none_say_where(
    row: object, message: str, supervised: Callable[..., Config], tmp_path: Path
) -> None:
    config = supervised(chat={"template": "hermes"})
    chat, env = bare_task(config).chat, Examples(write(tmp_path / "a.jsonl", [row]))
    with pytest.raises(RloraError, match=message):
        [example_of(prompt, chat, config, 0) for prompt in env.train()]


def test_a_template_that_drops_a_call_is_an_error(supervised: Callable[..., Config], tmp_path: Path) -> None:
    """Also with content beside the call, and after a row that renders."""
    config = supervised(sampling={"max_tokens": 99, "max_prompt_tokens": 200})
    chat = bare_task(config).chat  # its template renders content only
    for content in ("Let me look.", None):
        call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
        row = {"messages": [user("What time is it?"), call, {"role": "tool", "content": "12:00"}, assistant("Noon.")]}
        (prompt,) = Examples(write(tmp_path / "a.jsonl", [row])).train()
        with pytest.raises(RloraError, match="does not render a message of the policy with a call"):
            example_of(prompt, chat, config, 0)


def test_an_end_token_inside_a_call_is_an_error(supervised: Callable[..., Config], tmp_path: Path) -> None:
    config = supervised(chat={"template": "hermes"}, sampling={"max_tokens": 99, "max_prompt_tokens": 200})
    call = {"name": "now", "arguments": {"zone": "<|im_end|>"}}
    row = {"messages": [user("?"), {"role": "assistant", "tool_calls": [call]}]}
    (prompt,) = Examples(write(tmp_path / "a.jsonl", [row])).train()
    with pytest.raises(RloraError, match=r"contains <\|im_end\|>, which ends a message"):
        example_of(prompt, bare_task(config).chat, config, 0)


def test_steps_without_episodes_are_told(
    recorded: str, bundle: Callable[..., Bundle], caplog: pytest.LogCaptureFixture
) -> None:
    assert len(RunEpisodes(recorded, pairs=True).train()) == 2
    assert not caplog.records
    write_directory(bundle_path(UPath(recorded), 5), replace(bundle(5), update=None).files)
    assert len(RunEpisodes(recorded, pairs=True).train()) == 2
    assert (
        "3 of its first 5 steps have no bundle with episodes; to learn from all of them, train it with" in caplog.text
    )
    for version in (1, 2):
        shutil.rmtree(bundle_path(UPath(recorded), version))
    with pytest.raises(RloraError, match="2 of its first 2 steps have no bundle with episodes; raise"):
        RunEpisodes(recorded, pairs=True, steps=2).train()


def test_a_completion_that_was_right_and_wrong_is_no_pair(tmp_path: Path, bundle: Callable[..., Bundle]) -> None:
    """A timeout can score a right completion as wrong."""
    write_provenance(tmp_path)
    sampled = group([5], episode([7], 1.0), episode([7], 0.0), episode([9], 0.0))
    made = replace(bundle(1), update=episodes.encode([sampled]))
    write_directory(bundle_path(UPath(tmp_path), 1), made.files)
    (pair,) = RunEpisodes(str(tmp_path), pairs=True, most=9).train()
    assert [c.completion_ids for c in pair.completions if isinstance(c, Episode)] == [(7,), (9,)]


def test_episodes_of_truncated_sampling_are_learned_from_with_all_tokens(supervised: Callable[..., Config]) -> None:
    sampled = replace(episode([7, 8], 1.0), kept=Kept(np.asarray([7, 8], np.int32).tobytes(), (1, 1)))
    made = supervised()
    prompt = Prompt("?", token_ids=(5,), completions=(sampled,))
    (learned,) = example_of(prompt, bare_task(made).chat, made, 0).episodes
    assert learned == replace(sampled, kept=None)  # and the weight 1 as its reward


def test_episodes_of_another_tokenizer_are_refused(
    recorded: str, supervised: Callable[..., Config], tmp_path: Path
) -> None:
    made = supervised(env="rlora.envs.episodes:RunEpisodes", env_args={"run": recorded})
    other = tmp_path / "other"
    shutil.copytree(locate(made.model), other, copy_function=os.symlink)
    assert len(load_task(replace(made, model=str(other))).examples) == 4  # the same tokens
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RloraError, match=r"its examples have tokens of .* use a model with the same tokenizer"):
        load_task(replace(made, model=str(other)))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("?", completions=(7,)), "a Prompt with the completion 7; use a string, an Episode"),
        (Prompt("?", completions=(None,)), "a Prompt with the completion None"),
        (Prompt("?", completions=({"role": "assistant", "content": "a"},)), "a Prompt with the completion {'role'"),
        (Prompt("?", completions=([{"content": "a"}],)), r"a Prompt with the completion \[{'content'"),
        (Prompt("?", completions=([],)), r"a Prompt with the completion \[\]"),
        (Prompt("?", completions=("a",), weight=math.nan), "a Prompt whose weight is nan; use a number of 0 or more"),
        (Prompt("?", completions=("a",), weight=-1.0), "a Prompt whose weight is -1.0"),
        (Prompt((), completions=([assistant("a")],)), "its prompt is empty, which only a single completion of text"),
        (Prompt((), completions=("a", "b")), "it has 2 completions, but algorithm.loss = 'sft' learns from one"),
        (Prompt("?", completions=([assistant("a"), assistant("b")],), source="x.jsonl, row 7"),
         "x.jsonl, row 7: message 2 of the completion: two messages of the assistant in a row"),
        (Prompt("?", completions="a"), "a Prompt whose completions are 'a'; use a tuple"),
        (Prompt("?", completions=None), "a Prompt whose completions are None"),
        (Prompt("?", completions=("a",), tools=None), "a Prompt whose tools are None"),
        (Prompt("?", completions=("",)), "example 0: a message of the assistant is empty"),
        (Prompt("?", completions=([{**assistant(""), "tool_calls": [{"name": "now", "arguments": {}}]}],)),
         r"a chat message whose tool_calls are \[{'name': 'now'.*use a list of"),
        (Prompt([{**user("a"), "tool_calls": {}}, {**user("a"), "tool_calls": {"a": 1}}], completions=("b",)),
         "a chat message whose tool_calls are {'a': 1}"),
        (Prompt("?", completions=([{**assistant("a"), "reasoning_content": 5}],)), "whose reasoning_content is 5"),
        (Prompt("?", completions=([{**assistant(""), "tool_calls": [{"function": SETS}]}],)),
         "a chat message whose tool_calls are not JSON"),
    ],
)  # fmt: skip
def test_bad_completions_of_an_own_env_say_what_is_wrong(
    prompt: Any, message: str, supervised: Callable[..., Config]
) -> None:
    class Own:
        def train(self) -> list[Prompt]:
            return [prompt]

        def held_out(self) -> list[Prompt]:
            return []

    with pytest.raises(RloraError, match=message):
        load_task(supervised(env=register(Own())))


def test_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"})
    bad = json.dumps({"prompt": "a", "completion": ""})
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n\n{good}\n{bad}\n")
    with pytest.raises(RloraError, match=r"^line 5 of \S+a\.jsonl, train, row 2: column 'completion' is empty"):
        Examples(str(tmp_path / "a.jsonl")).train()
    with pytest.raises(RloraError, match=r"^line 5 of \S+a\.jsonl, train\[1:\], row 1: column 'completion' is empty"):
        Examples(str(tmp_path / "a.jsonl"), split="train[1:]").train()
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, row in enumerate((good, bad)):
        (shards / f"train-0000{number}-of-00002.jsonl").write_text(row + "\n")
    with pytest.raises(RloraError, match=r"^line 1 of \S+00001-of-00002\.jsonl, in \S+shards, train, row 1: column"):
        Examples(str(shards)).train()
    (tmp_path / "b.csv").write_text('prompt,completion\n"a\n\nb",c\n"a\nb",\n')
    with pytest.raises(RloraError, match=r"^line 5 of \S+b\.csv, train, row 1: column 'completion' is null"):
        Examples(str(tmp_path / "b.csv")).train()


def test_an_answer_can_be_json_and_a_prompt_can_be_parts_as_text(tmp_path: Path) -> None:
    parts = json.dumps({"type": "text", "text": "hi"})
    (prompt,) = Examples(write(tmp_path / "a.jsonl", [{"messages": [user(parts), assistant(parts)]}])).train()
    assert prompt.text == [user("hi")]
    assert prompt.completions == ((assistant(parts),),)


def test_pairs_have_no_weights(supervised: Callable[..., Config], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "w": 0.5}])
    made = supervised(algorithm={"name": "dpo", "kl": 0.1}, env_args={"path": path, "weight": "w"})
    with pytest.raises(
        RloraError, match=r"row 0: its weight is 0\.5, but algorithm\.loss = 'dpo' weighs all pairs ali"
    ):
        load_task(made)


def test_examples_of_an_env_with_tools_offer_them(supervised: Callable[..., Config]) -> None:
    def price(item: str) -> int:
        """Return a price.

        Args:
            item: The item.
        """
        return len(item)

    class Shop:
        tools = (price,)

        def train(self) -> list[Prompt]:
            return [Prompt("What does a pen cost?", completions=("3",))]

        def held_out(self) -> list[Prompt]:
            return []

    made = supervised(env=register(Shop()), chat={"template": "hermes"}, sampling={"max_prompt_tokens": 512})
    task = load_task(made)
    assert "Return a price." in task.chat.decode(task.examples[0].prompt.token_ids)
