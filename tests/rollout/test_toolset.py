"""Tools of an env: schemas, the chat templates of model families, and calls in real scoring processes."""

import asyncio
import enum
import importlib.util
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlora.model.base import load_tokenizer
from rlora.model.chat import Chat
from rlora.model.tool_calls import FORMS, ToolCall
from rlora.records import Prompt, RloraError
from rlora.rollout.task import load_task, setup_of
from rlora.rollout.toolset import Toolset, toolset_of
from rlora.scoring.pool import Pool
from rlora.scoring.scoring import Scoring
from rlora.scoring.tools import as_text
from rlora.scoring.worker import EnvTurn
from rlora.settings import ChatConfig, Config

TOOLS = Path(__file__).parents[1] / "tool_env.py"
MISTRAL = """{{ '<s>' }}{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- if loop.first and tools -%}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif -%}
{{ '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls -%}{{ '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls -%}
{%- if call.id|length != 9 -%}{{ raise_exception('Tool call IDs must have length 9') }}{%- endif -%}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (', ' if not loop.last else '') -}}
{%- endfor -%}{{ ']</s>' }}
{%- elif message.role == 'tool' -%}
{%- if message.tool_call_id|length != 9 -%}{{ raise_exception('Tool call IDs must have length 9') }}{%- endif -%}
{{ '[TOOL_RESULTS] {"content": ' + message.content + '}[/TOOL_RESULTS]' }}
{%- else -%}{{ ' ' + message.content + '</s>' }}{%- endif -%}{%- endfor -%}"""  # as Mistral's up to v3, in short
FAMILIES = {  # the template, the form of its calls, its special tokens with the one that ends a message first
    "qwen2_5": ("hermes", ["<|im_end|>", "<|im_start|>"]),
    "qwen3": ("hermes", ["<|im_end|>", "<|im_start|>"]),
    "qwen3_5_nothink": ("xml", ["<|im_end|>", "<|im_start|>"]),
    "llama3_1": ("json", ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "llama3_2": ("json", ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": ("json", ["</s>", "<s>", "[TOOL_CALLS]", "[INST]", "[/INST]"]),
    "hermes": ("hermes", ["<|im_end|>", "<|im_start|>"]),
}


def multiply(a: int, b: int) -> int:
    """Multiply two integers.

    Args:
        a: The first factor.
        b: The second factor.
    """
    return a * b


class Tools:
    def __init__(self, *tools: Any, **methods: Any) -> None:
        self.tools = tools
        vars(self).update(methods)


@pytest.fixture
def chat(demo: str) -> Chat:
    return Chat(load_tokenizer(demo), ChatConfig(template="hermes"), (2,))


def published(family: str) -> str:
    """The template of a model family, as the TRL package has it; ours by its name."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{family}.jinja").read_text()


def chat_of(template: str, special: list[str], ends: int = 1) -> Chat:
    """A chat with a template, over a tokenizer of bytes and special tokens, of which the first `ends` end messages."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": special})
    return Chat(fast, ChatConfig(template=template), tuple(range(len(alphabet), len(alphabet) + ends)))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Chat:
    """A chat with a family's template."""
    template = {"mistral": MISTRAL, "hermes": "hermes"}.get(request.param) or published(request.param)
    return chat_of(template, FAMILIES[request.param][1])


def test_templates_of_model_families_show_the_form_of_their_calls(family: Chat, request: pytest.FixtureRequest) -> None:
    tools = toolset_of(Tools(multiply), family)
    assert tools is not None
    assert tools.parser is FORMS[FAMILIES[request.node.callspec.params["family"]][0]]
    ids = family.prompt_ids("What is 347 * 28?", tuple(tools.schemas.values()))
    assert "Multiply two integers." in family.decode(ids)


def test_ids_over_five_turns_are_those_that_the_template_renders(family: Chat) -> None:
    """The prompt, five messages with a call each, their results, and the answer: decoded, the whole conversation."""
    tools = toolset_of(Tools(multiply), family)
    assert tools is not None
    schemas = tuple(tools.schemas.values())
    conversation: list[dict[str, Any]] = [{"role": "user", "content": "Multiply."}]
    ids = list(family.prompt_ids(conversation, schemas))
    for number in range(5):
        function = {"name": "multiply", "arguments": {"a": number, "b": 28}}
        call = {"type": "function", "id": "call00000", "function": function}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        sampled = [*family._ids(family.answers.text_and_end(message)[0]), family.stop_token_ids[0]]
        assert tools.calls(family.text(sampled)) == [ToolCall("multiply", {"a": number, "b": 28})]
        result = {"role": "tool", "name": "multiply", "content": str(28 * number), "tool_call_id": "call00000"}
        reply = family.reply_ids([result], sampled)
        ids += [*sampled, *reply]
        conversation += [message, result]
    expected = family._template.render(conversation, tokenize=False, tools=list(schemas))
    assert family.decode(ids) == expected


@pytest.mark.parametrize(
    ("template", "ends", "after_call", "answer"),
    [
        (
            "glm4moe",
            ["<|endoftext|>", "<|user|>", "<|observation|>"],
            "<|observation|>",
            "\n<think></think>\nTwo.<|user|>",
        ),
        ("gptoss", ["<|return|>", "<|call|>"], "<|call|>", "<|channel|>final<|message|>Two.<|return|>"),
        ("llama3_1", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|eot_id|>", "Two.<|eot_id|>"),
    ],
)
def test_a_given_message_ends_with_the_token_that_the_template_writes_after_it(
    template: str, ends: list[str], after_call: str, answer: str
) -> None:
    """Some templates write no token after a message until the next one begins, and one of another kind after a call."""
    chat = chat_of(published(template), ends, len(ends))
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 1, "b": 2}}}
    result = {"role": "tool", "name": "multiply", "content": "2"}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        result,
        {"role": "assistant", "content": "Two."},
    ]
    ids, mask = chat.completion_ids(messages, "1 * 2?")
    own = [
        [token for token, _ in run]
        for is_own, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1])
        if is_own
    ]
    assert chat.decode(own[0][-1:]) == after_call
    assert chat.decode(own[1]) == answer
    if answer.endswith(after_call):  # the reply continues after the end token
        return
    assert chat.decode(ids).count(after_call) == 1


@pytest.mark.parametrize(
    ("template", "ends", "plain", "thoughtful"),
    [
        ("qwen2_5", ["<|im_end|>"], "4<|im_end|>", "<think>\nA sum.\n</think>\n\n4<|im_end|>"),
        ("qwen3", ["<|im_end|>"], "<think>\n\n</think>\n\n4<|im_end|>", "<think>\nA sum.\n</think>\n\n4<|im_end|>"),
        ("qwen3_5_think", ["<|im_end|>"], "<think>\n\n</think>\n\n4<|im_end|>",
         "<think>\nA sum.\n</think>\n\n4<|im_end|>"),
        ("deepseek_r1_distill", ["</s>"], "<think>\n\n</think>\n\n4</s>", "<think>\nA sum.\n</think>\n\n4</s>"),
        ("nemotron_3_nano", ["<|im_end|>"], "<think>\n</think>4<|im_end|>",
         "<think>\nA sum.\n</think>\n4<|im_end|>"),
        ("glm4moe", ["<|user|>"], "\n<think></think>\n4<|user|>", "\n<think>A sum.</think>\n4<|user|>"),
        ("gptoss", ["<|return|>"], "<|channel|>final<|message|>4<|return|>",
         "<|channel|>analysis<|message|>A sum.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"),
    ],
)  # fmt: skip
def test_given_answers_with_and_without_thoughts_are_as_the_template_renders_the_last_message(
    template: str, ends: list[str], plain: str, thoughtful: str
) -> None:
    """In each turn, whether or not the prompt opens a thought."""
    chat = chat_of(published(template), ends)
    thinking = {"role": "assistant", "content": "4", "reasoning_content": "A sum."}
    question, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    for messages, texts in (
        ([answer, question, answer], [plain, plain]),
        ([thinking, question, answer], [thoughtful, plain]),
        ([answer, question, thinking], [plain, thoughtful]),
    ):
        rendered = chat.decode(chat.prompt_ids([question]) + chat.completion_ids(messages, [question])[0])
        assert texts[0] in rendered.removesuffix(texts[1])
        assert rendered.endswith(texts[1])
        assert rendered.count("<think>") == rendered.count("</think>") == sum("<think>" in text for text in texts)


@pytest.mark.parametrize(
    "content", ["<think>\nA sum.\n</think>\n\n4", "<think>A sum.</think>4", "A sum.\n</think>\n\n4"]
)
@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_5_think", "deepseek_r1_distill"])
def test_a_thought_inside_a_given_content_stays_as_it_is(template: str, content: str) -> None:
    chat = chat_of(published(template), ["<|im_end|>"])
    prompt = [{"role": "user", "content": "2 + 2?"}]
    rendered = chat.decode(chat.prompt_ids(prompt) + chat.completion_ids(content, prompt)[0])
    opened = template in ("qwen3_5_think", "deepseek_r1_distill")
    assert rendered.count("<think>") == (1 if opened else content.count("<think>"))
    assert rendered.count("</think>") == 1
    assert rendered.endswith(content.removeprefix("<think>") + "<|im_end|>")


def test_a_thought_is_refused_if_the_template_has_closed_it() -> None:
    chat = chat_of(published("qwen3_5_nothink"), ["<|im_end|>"])
    answer = {"role": "assistant", "content": "4"}
    assert chat.decode(chat.completion_ids([answer], "2 + 2?")[0]) == "4<|im_end|>"
    with pytest.raises(RloraError, match="has a thought, but the chat template ends a prompt with </think>"):
        chat.completion_ids([answer | {"reasoning_content": "A sum."}], "2 + 2?")


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        ("qwen3_5_think", " <think>A sum.</think>4", "A sum.</think>4"),  # the prompt ends with <think>
        ("qwen3_5_think", "<think>\n\n</think>\n\n4", "\n</think>\n\n4"),
        ("qwen3_5_nothink", "<think>\n\n</think>\n\n4", "4"),  # the prompt ends with an empty thought
        ("qwen3", "\n<think>\n\n</think>\n\n4", "<think>\n\n</think>\n\n4"),
        ("qwen2_5", " 4 \n", " 4 \n"),
    ],
)
def test_a_given_thought_is_written_once(template: str, content: str, expected: str) -> None:
    chat = chat_of(published(template), ["<|im_end|>", "<|im_start|>"])
    assert chat.decode(chat.completion_ids(content, "2 + 2?")[0]) == expected + "<|im_end|>"
    with pytest.raises(RloraError, match="has <think> without </think>; fix or drop the row"):
        chat.completion_ids("<think>A sum is", "2 + 2?")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("llama3_1", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("qwen2_5", "<|im_end|>"), ("glm4moe", "<|user|>"),
        ("cohere2", "<|END_OF_TURN_TOKEN|>"), ("gemma3", "<end_of_turn>"), ("qwen3", "<|im_end|>"),
    ],
)  # fmt: skip
def test_a_given_answer_ends_and_has_spaces_as_the_template_renders_it(template: str, end: str) -> None:
    special = [end, "<|im_start|>", "<|START_OF_TURN_TOKEN|>", "<|END_RESPONSE|>", "<start_of_turn>"]
    chat = chat_of(published(template).replace("bos_token", "''"), list(dict.fromkeys(special)))
    prompt, answer = [{"role": "user", "content": "2 + 2?"}], {"role": "assistant", "content": " \n4 \n"}
    expected = chat._template.render([*prompt, answer], tokenize=False, add_generation_prompt=False)
    ids = chat.prompt_ids(prompt) + chat.completion_ids([answer], prompt)[0]
    assert chat.decode(ids) == expected.removesuffix("\n").removesuffix(end) + end
    turns = chat.decode(chat.completion_ids([answer, *prompt, answer], prompt)[0])
    ending = turns[turns.rindex("4") :]
    assert turns[turns.index("4") :].startswith(ending)
    assert turns.partition("2 + 2?")[0].count(end) == ending.count(end) == 1


def test_a_template_that_ends_messages_with_another_token_is_refused() -> None:
    """A base model with a ChatML template whose only end token is that of a text."""
    chat = chat_of(published("qwen2_5"), ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
    with pytest.raises(RloraError, match=r"ends a message with <\|im_end\|>, .*set chat\.stop_token_ids = \[257\]"):
        chat.completion_ids("4", "2 + 2?")


CLOCK = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": {}}}
DATE = {"id": "call_2", "type": "function", "function": {"name": "today", "arguments": {}}}


@pytest.mark.parametrize(
    ("template", "ends", "expected"),
    [
        ("gptoss", ["<|return|>", "<|call|>"], "functions.now to=assistant"),
        ("gemma4_v5", ["<turn|>", "<|tool_response>"], "response:now{"),
        ("gemma4", ["<turn|>", "<|tool_response>"], "response:now{"),
        ("muse_glimmer", ["<|eot|>"], "tool now<|message|>"),
    ],
)
def test_a_result_without_a_name_has_that_of_its_call(template: str, ends: list[str], expected: str) -> None:
    chat = chat_of(published(template).replace("bos_token", "''"), ends, len(ends))
    called = {"role": "assistant", "content": "", "tool_calls": [CLOCK]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "12:00"}
    ids, _ = chat.completion_ids([called, result, {"role": "assistant", "content": "Noon."}], "Time?")
    assert expected in chat.decode(ids)


@pytest.mark.parametrize("keys", [("call_2", "call_1"), (None, None)])
def test_results_are_named_by_the_ids_of_their_calls_or_in_order(keys: tuple[str | None, str | None]) -> None:
    source = "{% for m in messages %}<{{ m.role }} {{ m.name }}>{{ m.content }}{{ m.tool_calls }}<end>{% endfor %}"
    chat = chat_of(source, ["<end>"])
    called = {"role": "assistant", "content": "", "tool_calls": [CLOCK, DATE]}
    results = [
        {"role": "tool", "content": "a", "tool_call_id": keys[0]},
        {"role": "tool", "content": "b", "tool_call_id": keys[1]},
    ]
    results = [{key: value for key, value in result.items() if value} for result in results]
    text = chat.decode(chat.completion_ids([called, *results, {"role": "assistant", "content": "c"}], "Time?")[0])
    first, second = ("today", "now") if keys[0] else ("now", "today")
    assert f"<tool {first}>a" in text
    assert f"<tool {second}>b" in text


def test_content_that_the_template_moves_behind_the_call_is_refused() -> None:
    chat = chat_of(published("gemma4_v5").replace("bos_token", "''"), ["<turn|>", "<|tool_response>"], 2)
    called = {"role": "assistant", "content": "Let me look.", "tool_calls": [CLOCK]}
    with pytest.raises(RloraError, match="tool_calls has content, which the chat template does not render in the mess"):
        chat.completion_ids([called], "Time?")


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ([{"role": "assistant", "content": " "}], "a message of the assistant is empty"),
        ("", "a message of the assistant is empty"),
        (
            [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
            "begins or ends with a message of use",
        ),
        ([{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], "with a message of system"),
    ],
)
def test_a_completion_that_is_no_answer_is_refused(completion: Any, message: str, chat: Chat) -> None:
    with pytest.raises(RloraError, match=message):
        chat.completion_ids(completion, "2 + 2?")


def test_a_prefill_is_in_a_given_answer_once_in_each_turn(chat: Chat) -> None:
    filled = Chat(chat.tokenizer, ChatConfig(prefill="Answer: "), chat.stop_token_ids)
    question, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Answer: 4"}
    ids = filled.prompt_ids([question]) + filled.completion_ids([answer, question, answer], [question])[0]
    assert filled.decode(ids).count("Answer: 4<|im_end|>") == filled.decode(ids).count("Answer:") == 2


@pytest.mark.parametrize("content", ["4<|im_end|>", "4<|im_end|>\n<|im_start|>user\n2 + 3?"])
def test_a_given_answer_that_contains_an_end_token_is_refused(content: str, chat: Chat) -> None:
    with pytest.raises(RloraError, match=r"contains <\|im_end\|>, which ends a message"):
        chat.completion_ids(content, "2 + 2?")


def test_a_call_after_an_opened_thought_begins_with_its_tag() -> None:
    """`<think>` and `<tool_call>` begin with the same characters, and the call keeps all of its own (as in QwQ)."""
    template = published("qwen2_5")
    opening = "<|im_start|>assistant\\n<think>\\n' }}".join(template.rsplit("<|im_start|>assistant\\n' }}", 1))
    assert "<think>" in opening
    chat = chat_of(opening, ["<|im_end|>", "<|im_start|>"])
    called = {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "multiply", "arguments": {"a": 1, "b": 2}}}
    ]}  # fmt: skip
    rendered = chat.decode(chat.prompt_ids("1 * 2?") + chat.completion_ids([called], "1 * 2?")[0])
    assert rendered.partition("assistant\n")[2].startswith("<think>\n\n</think>\n\n<tool_call>")


def test_a_given_thought_precedes_the_answer_and_a_hidden_one_is_refused(chat: Chat) -> None:
    thinking = chat_of(published("qwen3"), ["<|im_end|>", "<|im_start|>"])
    message = {"role": "assistant", "content": "Two.", "reasoning_content": "1 * 2 is 2."}
    expected = thinking._template.render([{"role": "user", "content": "?"}, message], tokenize=False)
    assert thinking.answers.text_and_end(message)[0] + "<|im_end|>" in expected
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 1, "b": 2}}}
    called = message | {"tool_calls": [call], "content": ""}
    assert thinking.answers.text_and_end(called)[0].startswith("<think>\n1 * 2 is 2.\n</think>\n\n<tool_call>")
    with pytest.raises(RloraError, match="reasoning_content, which the chat template does not render"):
        chat.answers.text_and_end(called)


def test_arguments_that_are_not_json_are_an_error_that_shows_them(chat: Chat) -> None:
    call = {"type": "function", "function": {"name": "multiply", "arguments": '{"a": '}}
    with pytest.raises(RloraError, match=r"'multiply' has the arguments '\{\"a\": ', which are not valid JSON"):
        chat.prompt_ids([{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}])


def test_a_message_with_several_calls_gets_several_results(chat: Chat) -> None:
    results = [{"role": "tool", "name": "multiply", "content": text} for text in ("1", "2")]
    assert chat.decode(chat.reply_ids(results, (5, 2))) == (
        "\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_calls_in_a_thought_are_not_made(chat: Chat) -> None:
    tools = toolset_of(Tools(multiply), chat)
    assert tools is not None
    call = '<tool_call>{"name": "multiply", "arguments": {"a": "2", "b": 3}}</tool_call>'
    made = ToolCall("multiply", {"a": 2, "b": 3})
    quoted = '<tool_call>{"name": "multiply", "arguments": {"a": "<think>", "b": "</think>"}}</tool_call>'
    for text, calls in (
        (f"<think>{call}</think>6", []),
        (f"<think>?</think>{call}", [made]),
        (f"<think>{call}", []),
        (f"<think>a</think>{call}<think>b</think>{call}", [made, made]),
        (f"{call}<think>x</think>done", [made]),
        (quoted, [ToolCall("multiply", {"a": "<think>", "b": "</think>"})]),
    ):
        assert tools.calls(text) == calls


def test_a_tag_in_the_arguments_of_a_call_as_json_stays(chat: Chat) -> None:
    tools = toolset_of(Tools(Bound().put), chat)
    assert tools is not None
    tools = replace(tools, parser=FORMS["json"])
    tagged = '{"name": "put", "parameters": {"item": "a<think>b</think>c"}}'
    opened = '{"name": "put", "parameters": {"item": "<think>"}}'
    put, put_opened = (ToolCall("put", {"item": item}) for item in ("a<think>b</think>c", "<think>"))
    for text, calls in (
        (tagged, [put]),
        (f"<think>{opened}</think>\n{tagged}; {opened}", [put, put_opened]),
        (f"[{tagged}, {opened}]", [put, put_opened]),
        (f"```json\n{tagged}\n```", [put]),
        (f"{tagged}<think>{opened}</think>", [put]),
        (f"<think>{opened}", []),
    ):
        assert tools.calls(text) == calls
    (cut,) = tools.calls('{"name": "put", "parameters": {"item": "<think>')
    assert "not valid JSON" in cut.fault


def of_properties(**properties: object) -> dict[str, Any]:
    return {"name": "add", "parameters": {"type": "object", "properties": properties}}


class Bound:
    def put(self, item: str) -> str:
        """Put.

        Args:
            item: What.
        """
        return item


def any_number(*items: int) -> int:
    """Add.

    Args:
        items: Numbers.
    """
    return sum(items)


def tax(state: str, income: int) -> int:
    """Compute a tax.

    Args:
        state: Where.
        income: How much.
    """
    return income


def no_types(a, b):  # type: ignore[no-untyped-def]
    """Add.

    Args:
        a: One.
        b: Two.
    """


def no_docstring(a: int) -> int:
    return a


def generate(number: int) -> Iterator[int]:
    """Count.

    Args:
        number: Up to which number.
    """
    yield number


async def generate_later(number: int) -> AsyncIterator[int]:
    """Count.

    Args:
        number: Up to which number.
    """
    yield number


class Unit(enum.Enum):
    CELSIUS = "c"


def of_enum(units: list[Unit] | None) -> str:
    """Convert.

    Args:
        units: The units.
    """
    return str(units)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (Tools(multiply, multiply), "two of its tools have the name 'multiply'"),
        (Tools(no_types), "'no_types' has no schema: .* type hint"),
        (Tools(no_docstring), "'no_docstring' has no schema: .* docstring"),
        (Tools(of_enum), r"'of_enum' has a parameter 'units' of the type .*Unit.*use str, int.*Literal"),
        (Tools({"name": "mx", "parameters": {"properties": {}}}, mx=max), "'mx' can't be called: no signature"),
        (Tools(7), "its tool 7 has no name or can't be called"),
        (Tools({"type": "function"}), "is not the schema of a tool, because it has no name"),
        (Tools(Bound.put), "'put' has the parameter self"),
        (Tools(any_number), r"'any_number' has the parameter \*items"),
        (Tools(tax), "'tax' has a parameter 'state', which rlora sets"),
        (
            Tools({"name": "add", "parameters": {"properties": {"c": {}}}}, add=multiply),
            "'add' does not fit its schema",
        ),
        (
            Tools({"name": "add", "parameters": {"properties": {"state": {}}}}, add=multiply),
            "shows the parameter 'state'",
        ),
        (Tools(multiply, max_calls="3"), "its max_calls is '3'"),
        (Tools({"name": "add"}), "is a schema, but the env has no method add"),
        (Tools({"name": "add", "parameters": {"type": "array"}}, add=multiply), "'add': its parameters .* not a JSON"),
        (Tools({"name": "add", "parameters": {"properties": ["a"]}}, add=multiply), "'add': its parameters"),
        (Tools({"name": "add", "parameters": {"a": {"type": "str"}}}, add=multiply), "'add': its parameters"),
        (Tools(of_properties(a={"type": 5}, b={}), add=multiply), "'add': its parameters"),
        (Tools(of_properties(a={"anyOf": 5}, b={}), add=multiply), "'add': its parameters"),
        (Tools({"name": "add", "input_schema": {"type": "object"}}, add=multiply), "'input_schema', .* parameters"),
        (Tools(generate), "'generate' is a generator"),
        (Tools(generate_later), "'generate_later' is a generator"),
    ],
)
def test_an_invalid_tool_is_an_error(chat: Chat, env: Any, message: str) -> None:
    with pytest.raises(RloraError, match=message):
        toolset_of(env, chat)


def test_a_schema_calls_the_method_of_its_name(chat: Chat) -> None:
    numbers = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    schema = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": numbers}}
    tools = toolset_of(Tools(schema, add=multiply), chat)
    assert tools is not None
    assert tools.schemas["add"] == {"type": "function", "function": schema}


def test_a_template_without_tools_is_an_error(demo: str, chat: Chat) -> None:
    with pytest.raises(RloraError, match=r"does not render tools \(multiply\).*set chat\.template to .*hermes"):
        toolset_of(Tools(multiply), Chat(chat.tokenizer, ChatConfig(), (2,)))
    only_tools = "{{ tools }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(RloraError, match="does not render a message of the policy"):
        toolset_of(Tools(multiply), Chat(chat.tokenizer, ChatConfig(template=only_tools), (2,)))
    hermes = (Path(__file__).parents[2] / "rlora" / "model" / "hermes.jinja").read_text()
    other = Chat(chat.tokenizer, ChatConfig(template=hermes.replace("<tool_call>", "<call>")), (2,))
    with pytest.raises(RloraError, match=r"chat\.tool_calls = 'auto': .*<call>.*none of the forms"):
        toolset_of(Tools(multiply), other)
    no_end = Chat(chat.tokenizer, ChatConfig(template="hermes"), (5,))
    with pytest.raises(RloraError, match="none of the model's end tokens"):
        toolset_of(Tools(multiply), no_end)


def test_a_template_that_renders_tools_with_some_messages_only_is_an_error(chat: Chat) -> None:
    first = "{% if loop.first and m.role == 'user' %}{{ tools }}{% endif %}"
    template = "{% for m in messages %}" + first + "{{ m.content }}{% endfor %}"
    own, tools = Chat(chat.tokenizer, ChatConfig(template=template), (2,)), [of_properties(a={"type": "integer"})]
    schemas = [{"type": "function", "function": schema} for schema in tools]
    asked = {"role": "user", "content": "2 + 2?"}
    assert own.prompt_ids([asked], schemas)
    with pytest.raises(RloraError, match=r"does not render tools \(add\)"):
        own.prompt_ids([{"role": "system", "content": "Be brief."}, asked], schemas)


def test_a_parser_of_ones_own(demo: str, chat: Chat) -> None:
    own = Chat(chat.tokenizer, ChatConfig(template="hermes", tool_calls=f"{TOOLS}:parse"), (2,))
    tools = toolset_of(Tools(multiply), own)
    assert tools is not None
    assert tools.calls("CALL multiply 2 3") == [ToolCall("multiply", {"a": 2, "b": 3})]
    assert toolset_of(Tools(multiply), own) == tools  # the env of an evaluation set has the same tools
    with pytest.raises(RloraError, match=r"chat\.tool_calls = 'qwen'"):
        toolset_of(Tools(multiply), Chat(chat.tokenizer, ChatConfig(template="hermes", tool_calls="qwen"), (2,)))


@pytest.fixture
def played(config: Callable[..., Config]) -> Iterator[tuple[Toolset, Scoring, Prompt]]:
    settings = config(
        env=f"{TOOLS}:Shop", env_args={}, reward="rlora.rewards.integer:integer_answer",
        chat={"template": "hermes"}, sampling={"max_prompt_tokens": 600, "max_tokens": 64}, scoring={"deadline": 1.0},
    )  # fmt: skip
    task = load_task(settings)
    assert task.agent
    assert task.tools is not None
    with closing(Pool(setup_of(settings, agent=True), 1)) as pool:
        yield task.tools, Scoring(settings, [pool]), task.prompts[0]


def test_an_enormous_result_is_cut_and_says_so() -> None:
    for result in ("a" * 2_000_000, ["a" * 1_999_996]):
        text = as_text(result)
        assert len(text) < 1_000_100
        assert text.endswith(" [cut: 2000000 characters]")


def test_calls_and_their_statuses(played: tuple[Toolset, Scoring, Prompt]) -> None:
    tools, scoring, prompt = played
    block = "<tool_call>{}</tool_call>".format
    text = "".join([
        block('{"name": "put", "arguments": {"item": "pen", "number": 2}}'),
        block('{"name": "put", "arguments": {"item": "cup", "number": 3}}'),
        block('{"name": "fail", "arguments": {}}'), block('{"name": "hang", "arguments": {}}'),
        block('{"name": "leave", "arguments": {}}'), block('{"name": "gone", "arguments": {}}'),
        block('{"name": "put", "arguments": {"thing": "pen"}}'), block('{"name": "put"'),
        block('{"name": "put", "arguments": {"item": "pen", "number": 1, "state": {}}}'),
        block('{"name": "question", "arguments": {}}'),
    ])  # fmt: skip
    reply = asyncio.run(tools.answer(tools.calls(text), EnvTurn(prompt, text, {}), scoring))
    assert isinstance(reply.content, list)
    results = [(message["name"], message["status"], message["content"]) for message in reply.content]
    assert results == [
        ("put", "ok", '{"pen": 2}'),
        ("put", "ok", '{"pen": 2, "cup": 3}'),
        ("fail", "error", "error: ValueError: out of stock"),
        ("hang", "timeout", "error: the call took too long"),
        ("leave", "error", "error: the call ended its process"),
        ("gone", "unknown", "error: there is no tool 'gone'; use put, fail, hang, leave, question"),
        ("put", "invalid", "error: missing a required argument: 'item'; its parameters are item, number"),
        ("", "malformed", results[7][2]),
        ("put", "invalid", "error: got an unexpected keyword argument 'state'; its parameters are item, number"),
        ("question", "ok", prompt.text),
    ]
    assert results[7][2].startswith("error: the call is malformed: not valid JSON")
    assert reply.state == {"basket": {"pen": 2, "cup": 3}}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (kind, f"{kind}: out of stock")
        for kind in ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "CancelledError", "TimeoutError")
    ]
    + [("MuteError", "MuteError:")],
)
def test_a_tool_may_raise_anything(kind: str, text: str, played: tuple[Toolset, Scoring, Prompt]) -> None:
    """Such as the SystemExit of argparse: the policy reads it, and the process of the tools goes on."""
    tools, scoring, prompt = played
    message = f'<tool_call>{{"name": "fail", "arguments": {{"kind": "{kind}"}}}}</tool_call>'
    for _ in range(5):
        reply = asyncio.run(tools.answer(tools.calls(message), EnvTurn(prompt, message, {}), scoring))
        assert isinstance(reply.content, list)
        assert [(m["status"], m["content"]) for m in reply.content] == [("error", f"error: {text}")]
