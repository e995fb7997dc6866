import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlora.model.base import load_base, load_tokenizer, stop_token_ids
from rlora.records import RloraError
from rlora.rollout.task import bare_task, load_task
from rlora.settings import Config

MakeConfig = Callable[..., Config]


def test_task_of_the_main_job(config: MakeConfig) -> None:
    task = load_task(config(evaluate={"prompts": 10}))
    assert len(task.held_out) == 10
    assert task.dropped == 0
    prompt = task.prompts[0]
    assert task.chat.decode(prompt.token_ids).count("<|im_start|>") == 3  # one system turn, no second BOS
    assert task.chat.decode(prompt.token_ids).endswith(f"{prompt.text}<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_that_are_too_long_are_left_out_and_counted(config: MakeConfig) -> None:
    everything = load_task(config())
    limit = min(len(prompt.token_ids) for prompt in everything.prompts)
    task = load_task(config(sampling={"max_prompt_tokens": limit, "max_tokens": 8}))
    assert all(len(prompt.token_ids) <= limit for prompt in task.prompts + task.held_out)
    assert task.dropped == len(everything.prompts + everything.held_out) - len(task.prompts + task.held_out) > 0
    with pytest.raises(
        RloraError, match=r"none of its \d+ training prompts has 1 to 5 tokens \(the shortest has \d\d\)"
    ):
        load_task(config(sampling={"max_prompt_tokens": 5}))


def test_every_end_token_of_the_model_stops(demo: str) -> None:
    assert stop_token_ids(demo, load_tokenizer(demo)) == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./no/such/model"}, r"model = './no/such/model': there is no such directory"),
        ({"model": "demo:gpt-5"}, r"model = 'demo:gpt-5': unknown demo model; use demo:smollm2-135m"),
        (
            {"env_args": {"hihg": 3}},
            r"env_args = \{'hihg': 3\}: it raised TypeError: .*'hihg'; fix env_args",
        ),
        ({"env_args": {"operator": "/"}}, r"env_args\.operator = '/': use one of"),
        ({"sampling": {"max_tokens": 100000}}, r"max_tokens = 100512: the context length of .* is \d+"),
        ({"reward": "rlora.config:read"}, r"reward = 'rlora\.config:read': its parameters \(path"),
        ({"reward": "mine.py:f"}, r"reward = 'mine\.py:f': there is no file mine\.py"),
        ({"reward_args": {"hihg": 3}}, r"reward_args\.hihg = 3: no reward function has a parameter of that name"),
    ],
)
def test_errors_are_found_before_anything_starts(changes: dict[str, object], message: str, config: MakeConfig) -> None:
    with pytest.raises(RloraError, match=message):
        load_task(config(**changes))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("['What is 1 + 1?']", r"its train\(\) returned 'What is 1 \+ 1\?'; return a rlora\.records\.Prompt"),
        ("'2 + 2?'", r"its train\(\) returned '2'; return a rlora\.records\.Prompt"),
        ("None", r"it raised TypeError: 'NoneType' .*train\(\) and held_out\(\) that return Prompts"),
        ("[Prompt(7)]", r"returned a Prompt whose text is 7; use a string"),
        ("[Prompt([])]", r"returned a Prompt whose text is \[\]; use a string"),
        ("[Prompt([{'role': 'user'}])]", r"text is \[\{'role': 'user'\}\]; .*\"content\""),
        ("[Prompt([{'role': 'user', 'content': 4}])]", r"text is .*4\}\]; .*with string values"),
    ],
)
def test_an_env_that_returns_no_prompts_is_named_with_its_value(
    value: str, message: str, tmp_path: Path, config: MakeConfig
) -> None:
    env = write_env(tmp_path, value)
    with pytest.raises(RloraError, match=re.escape(f"env = {env!r}") + ".*" + message):
        load_task(config(env=env))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[Prompt('a'), Prompt(None)]", r"returned a Prompt whose text is None; use a string.*\(prompt 1\)"),
        ("[Prompt('a'), Prompt(b'b')]", r"text is b'b'; use a string.*\(prompt 1\)"),
        ("[Prompt('a'), 7]", r"returned 7; .*\(prompt 1\)"),
        ("[Prompt([{'role': 'user', 'content': None}])]", r"text is .*None\}\]; .*\(prompt 0\)"),
        ("[Prompt('a', columns=None)]", r"whose columns are None; use a dict with column names as keys \(prompt 0\)"),
        ("[Prompt('a', columns={1: 2})]", r"whose columns are \{1: 2\}; use a dict"),
        ("[Prompt('a'), Prompt('b', columns={'f': lambda: 1})]", r"can't be sent to the processes .*\(prompt 1\)"),
        ("[Prompt('a', answer=iter(i for i in [1]))]", r"answer or columns can't be sent .*; use plain data"),
    ],
)
def test_an_error_in_a_prompt_names_its_number(value: str, message: str, tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(RloraError, match=message):
        load_task(config(env=write_env(tmp_path, value)))


def test_half_of_a_character_in_a_prompt_is_replaced_as_in_replies(tmp_path: Path, config: MakeConfig) -> None:
    messages = "[{'role': 'user', 'content': 'bad \\ud83d', 'name': 3}]"
    value = f"[Prompt('bad \\ud83d end', answer=1), Prompt('good \U0001f600', answer=1), Prompt({messages}, answer=1)]"
    task = load_task(config(env=write_env(tmp_path, value), evaluate={"prompts": 3}))
    for prompts in (task.prompts, task.held_out):
        assert [prompt.text for prompt in prompts] == [
            "bad ? end", "good \U0001f600", [{"role": "user", "content": "bad ?", "name": 3}],
        ]  # fmt: skip
        assert "bad ? end" in task.chat.decode(prompts[0].token_ids)


@pytest.mark.parametrize(
    ("annotation", "refused"), [("", True), (" -> str | list | None", True), (" -> str | None", False)]
)
def test_an_agent_whose_replies_the_template_does_not_show_is_refused(
    annotation: str, refused: bool, tmp_path: Path, config: MakeConfig
) -> None:
    env = write_env(tmp_path, "[Prompt('2 + 2?', answer=4)]")
    with (tmp_path / "mine.py").open("a") as file:
        file.write(f"\n    def reply(self, prompt, message, state){annotation}:\n        return None\n")
    settings = config(env=env, chat={"template": "{{ messages[0].content }}"})
    if refused:
        with pytest.raises(
            RloraError, match=r"chat\.template = .*does not render an env's reply after .*; .* set a different"
        ):
            load_task(settings)
    else:
        assert load_task(settings).agent
    assert load_task(config(env=env)).agent


def test_an_env_that_raises_is_reported_with_its_line(tmp_path: Path, config: MakeConfig) -> None:
    env = write_env(tmp_path, "[1 / 0]")
    with pytest.raises(RloraError, match=re.escape(f"{tmp_path}/mine.py:6: env = {env!r}") + ".*it raised ZeroDivis"):
        load_task(config(env=env))


def test_an_env_may_return_any_iterable(tmp_path: Path, config: MakeConfig) -> None:
    task = load_task(config(env=write_env(tmp_path, "(Prompt(f'{n}?') for n in range(9))"), evaluate={"prompts": 4}))
    assert [len(task.prompts), len(task.held_out)] == [9, 4]


def write_env(directory: Path, value: str) -> str:
    """Write an env whose methods both return `value`, an expression. Returns its spec."""
    file = directory / "mine.py"
    methods = "".join(f"    def {name}(self):\n        return {value}\n" for name in ("train", "held_out"))
    file.write_text(f"from rlora.records import Prompt\n\n\nclass Mine:\n{methods}")
    return f"{file}:Mine"


def test_a_local_directory_is_a_model(demo: str, tmp_path: Path, config: MakeConfig) -> None:
    task = load_task(config(model=demo))
    assert task.base == demo
    assert task.prompts
    with pytest.raises(RloraError, match="neither a local directory"):
        load_task(config(model=str(tmp_path)))  # empty
    shutil.copy(Path(demo) / "config.json", tmp_path)
    with pytest.raises(RloraError, match="the directory has no weights"):
        load_task(config(model=str(tmp_path)))


def test_every_end_token_ends_a_completion(demo: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo)
    assert stop_token_ids(demo, tokenizer) == (tokenizer.eos_token_id,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 11]}')
    assert stop_token_ids(str(tmp_path), tokenizer) == tuple(sorted([tokenizer.eos_token_id, 7, 11]))


def test_a_tokenizer_with_more_tokens_than_the_model_is_reported(demo: str, tmp_path: Path, config: MakeConfig) -> None:
    model = tmp_path / "m"
    shutil.copytree(demo, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"vocab_size": 2000}))
    with pytest.raises(
        RloraError, match=r"model = .*: its tokenizer produces token \d+, but the model has 2000 embeddings"
    ):
        load_task(config(model=str(model)))


def test_weights_that_do_not_fit_their_config_are_reported(demo: str, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(demo, model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cut off")
    with pytest.raises(RloraError, match=r"model = .*: transformers can't load the weights: .*save the model again"):
        load_base(str(model), torch.float32)


def test_further_end_tokens(config: Callable[..., Config]) -> None:
    assert bare_task(config(chat={"stop_token_ids": [5, 2]})).chat.stop_token_ids[-1] == 5
    with pytest.raises(RloraError, match=r"chat\.stop_token_ids: 49152 is not one of the model's 49152 tokens"):
        bare_task(config(chat={"stop_token_ids": [49152]}))
