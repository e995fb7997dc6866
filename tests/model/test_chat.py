"""Text to tokens and back, with the demo model's template."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from rlora.model.base import load_tokenizer
from rlora.model.chat import Chat
from rlora.records import RloraError
from rlora.settings import ChatConfig

STOP = (2,)  # <|im_end|>


@pytest.fixture
def chat(demo: str) -> Chat:
    return Chat(load_tokenizer(demo), ChatConfig(), STOP)


def with_settings(chat: Chat, **settings: object) -> Chat:
    return Chat(chat.tokenizer, ChatConfig(**settings), STOP)  # type: ignore[arg-type]


def test_a_string_is_a_user_message_with_a_template_and_bare_text_without_one(chat: Chat) -> None:
    assert chat.decode(chat.prompt_ids("2 + 2?")).endswith("user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    assert "Be brief." in chat.decode(chat.prompt_ids(messages))
    chat.tokenizer.chat_template = None
    bare = Chat(chat.tokenizer, ChatConfig(), STOP)
    assert bare.decode(bare.prompt_ids("2 + 2?")) == "2 + 2?"
    for call in (lambda: bare.prompt_ids(messages), lambda: bare.reply_ids(messages, (5,))):
        with pytest.raises(RloraError, match="no chat template"):
            call()


def test_the_config_gives_a_system_message_if_the_env_gives_none(chat: Chat) -> None:
    brief = with_settings(chat, system="Be brief.")
    assert brief.decode(brief.prompt_ids("2 + 2?")).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    messages = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "2 + 2?"}]
    assert "Be brief." not in brief.decode(brief.prompt_ids(messages))


def test_the_prefill_is_in_the_prompt_and_in_the_text_of_the_message(chat: Chat) -> None:
    thinking = with_settings(chat, prefill="<reason>", think=("<reason>", "</reason>"))
    assert thinking.decode(thinking.prompt_ids("2 + 2?")).endswith("assistant\n<reason>")
    ids = chat.tokenizer.encode("two twos</reason>4")
    assert thinking.text(ids) == "<think>two twos</think>4"
    assert thinking.text(ids, with_opening=False) == "two twos</think>4"


def test_a_template_of_the_config_and_its_arguments(chat: Chat) -> None:
    loud = with_settings(
        chat, template="{{ messages[0].content }}{% if loud %}!{% endif %}", template_args={"loud": True}
    )
    assert loud.decode(loud.prompt_ids("hello")) == "hello!"
    with pytest.raises(RloraError, match=r"chat\.template = 'none\.jinja': can't be read"):
        with_settings(chat, template="none.jinja")


def test_messages_that_the_template_rejects_raise_an_error(chat: Chat) -> None:
    strict = with_settings(chat, template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(RloraError, match=r"rejects .*'2 \+ 2\?'.* \(System role not supported\)"):
        strict.prompt_ids("2 + 2?")


@pytest.mark.parametrize("ended", [True, False])
def test_a_reply_of_messages_follows_as_in_a_conversation_with_or_without_an_end_token(chat: Chat, ended: bool) -> None:
    question, reply = [{"role": "user", "content": "2 + 2?"}], [{"role": "user", "content": "Are you sure?"}]
    completion = tuple(chat.tokenizer.encode("It is 4.")) + STOP * ended
    ids = chat.prompt_ids(question) + completion + chat.reply_ids(reply, completion)
    conversation = chat.prompt_ids([*question, {"role": "assistant", "content": "It is 4."}, *reply])
    assert chat.decode(ids) == chat.decode(conversation)
    assert ids == conversation  # here text and tokens agree; no token was decoded and encoded again


def test_a_model_without_an_end_token_gets_replies_but_no_given_completions(chat: Chat) -> None:
    question, reply = [{"role": "user", "content": "2 + 2?"}], [{"role": "user", "content": "Are you sure?"}]
    endless = Chat(chat.tokenizer, ChatConfig(), ())
    endless.check_replies()
    assert endless.reply_ids(reply, (5,)) == chat.reply_ids(reply, (5,))
    with pytest.raises(RloraError, match=r"ends a message with <\|im_end\|>, .*set chat.stop_token_ids = \[2\]"):
        endless.completion_ids("It is 4.", question)
    with pytest.raises(RloraError, match=r"names an end token, .*; set chat.stop_token_ids"):
        endless.text_ids("2 + 2 = 4")
    plain = Chat(chat.tokenizer, ChatConfig(template="{% for m in messages %}{{ m.content }}\n{% endfor %}"), ())
    assert plain.decode(plain.reply_ids(reply, (5,))) == "\nAre you sure?\n"
    with pytest.raises(RloraError, match=r"names an end token, .*; set chat.stop_token_ids"):
        plain.completion_ids("It is 4.", question)


def test_a_reply_of_a_string_continues_the_message(chat: Chat) -> None:
    assert chat.reply_ids(" 9716>>", (5,)) == tuple(chat.tokenizer.encode(" 9716>>"))


# --- text with which the template opens a message ---

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
END = "{% endif %}"
QWEN3 = (  # as in Qwen3: thinking of earlier turns is dropped, the last turn gets an empty block
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.index0 > ns.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ content }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + ASSISTANT
)
QWEN3_HYBRID = (
    QWEN3 + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}" + END
)
DEEPSEEK = (  # V3.1: </think> precedes each message without thinking
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|></think>"
    "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|>"
    "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if thinking %}\n<think>{% elif nothink %}\n"
    "<think></think>{% endif %}{% endif %}"
)
ONE_TURN = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}"
ZERO = (
    "Think in <think> </think> tags, then answer.\nUser: {{ messages[-1].content }}\nAssistant: Let me think.\n<think>"
)


@pytest.mark.parametrize(
    ("template", "arguments", "opened"),
    [
        (CHATML + ASSISTANT + END, {}, ""),
        (CHATML + ASSISTANT + "<think>\n" + END, {}, "<think>\n"),  # R1 distillations
        (QWEN3 + "<think>\n" + END, {}, "<think>\n"),  # Qwen3 Thinking 2507
        (QWEN3_HYBRID, {}, ""),
        (QWEN3_HYBRID, {"enable_thinking": True}, ""),
        (QWEN3_HYBRID, {"enable_thinking": False}, ""),  # an empty block is left out
        (DEEPSEEK, {"thinking": True}, "<think>"),
        (DEEPSEEK, {}, ""),
        (GLM, {}, ""),
        (GLM, {"thinking": True}, "<think>"),
        (GLM, {"nothink": True}, ""),
        (CHATML + ASSISTANT + "Sure, " + END, {}, "Sure, "),
        (CHATML + ASSISTANT + "Sure, <think>\n" + END, {}, "Sure, <think>\n"),
        (CHATML + "<|im_start|>assistant\n", {}, ""),  # regardless of add_generation_prompt
        (CHATML + "<|im_start|>assistant\nSure, ", {}, "Sure, "),
        (CHATML + "<|im_start|>assistant\n<think>\n", {}, "<think>"),  # Jinja drops a template's last line break
        (ZERO, {}, "<think>"),
        (ZERO + "\n\n", {}, "<think>\n"),
        (ZERO.removesuffix("<think>"), {}, ""),
        ("{{ messages[-1].content }}", {}, ""),
        ("{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}", {}, ""),
        (ONE_TURN + "\nA:<think>", {}, "<think>"),
    ],
)  # fmt: skip
def test_rewards_see_what_the_template_opens(
    chat: Chat, template: str, arguments: dict[str, object], opened: str
) -> None:
    thinking = with_settings(chat, template=template, template_args=arguments)
    assert thinking.decode(thinking.prompt_ids("2 + 2?")).endswith(opened)
    ids = chat.tokenizer.encode("2 and 2 is 4</think>\nfour")
    assert thinking.text(ids) == f"{opened}2 and 2 is 4</think>\nfour"
    assert thinking.text(ids, with_opening=False) == "2 and 2 is 4</think>\nfour"


def test_the_opening_may_depend_on_the_messages(chat: Chat) -> None:
    """Like Nemotron's template, which looks for /no_think, and DeepSeek's, which opens nothing after a tool."""
    template = (
        CHATML + "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|im_start|>assistant\n"
        "{% if '/no_think' in (messages | map(attribute='content') | join) %}<think></think>{% else %}"
        "<think>\n{% endif %}{% endif %}"
    )
    ids = chat.tokenizer.encode("4")
    dependent = with_settings(chat, template=template)
    assert dependent.text(ids, prompt="2 + 2?") == "<think>\n4"
    assert dependent.text(ids, prompt="2 + 2? /no_think") == "4"
    assert dependent.text(ids, prompt=[{"role": "user", "content": "2 + 2? /no_think"}]) == "4"
    assert dependent.text(ids, prompt=dependent.conversation([{"role": "user", "content": "Sure?"}])) == "<think>\n4"
    assert dependent.text(ids, prompt=dependent.conversation([{"role": "tool", "content": "4"}])) == "4"
    never = with_settings(chat, template=template, system="/no_think")
    assert never.text(ids) == never.text(ids, prompt="2 + 2?") == "4"
    reply = [{"role": "user", "content": "Sure?"}]
    assert never.decode(never.reply_ids(reply, (5,))).endswith("assistant\n<think></think>")
    assert never.text(ids, prompt=never.conversation(reply)) == "4"


@pytest.mark.parametrize("opens", ["", "<think>", "<think>\n", "<think>\n\n"])
@pytest.mark.parametrize("prefill", ["<think>", "<think>\n", "<think>\nOkay, ", "\n<think>\n"])
def test_a_prefill_that_the_template_also_opens_appears_once(chat: Chat, opens: str, prefill: str) -> None:
    both = with_settings(chat, template=CHATML + ASSISTANT + opens + END, prefill=prefill)
    prompt = both.decode(both.prompt_ids("2 + 2?"))
    opening = prompt.rpartition("assistant\n")[2]
    assert opening.count("<think>") == 1
    assert opening.split() == prefill.split()
    assert both.text(chat.tokenizer.encode("4")) == opening + "4"  # rewards see the text that the policy continues
    assert both.decode(both.reply_ids([{"role": "user", "content": "Sure?"}], (5,))).endswith(opening)


def test_a_prefill_follows_a_different_opening(chat: Chat) -> None:
    both = with_settings(chat, template=CHATML + ASSISTANT + "<think>\n" + END, prefill="First, ")
    assert both.decode(both.prompt_ids("?")).endswith("assistant\n<think>\nFirst, ")
    assert both.text(chat.tokenizer.encode("4")) == "<think>\nFirst, 4"
    closed = with_settings(chat, template=CHATML + ASSISTANT + "<think>\n" + END, prefill="<think>\n\n</think>\n\n")
    assert closed.decode(closed.prompt_ids("?")).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("template", "arguments"),
    [(QWEN3_HYBRID, {"enable_thinking": False}), (DEEPSEEK, {}), (QWEN3 + "<think>\n" + END, {})],
)
def test_a_prefill_that_repeats_a_tag_is_refused(chat: Chat, template: str, arguments: dict[str, object]) -> None:
    again = with_settings(chat, template=template, template_args=arguments, prefill="Hm. <think>\n")
    with pytest.raises(
        RloraError,
        match=r"chat\.prefill = 'Hm\. <think>\\n': the chat template already ends .*; unset chat\.prefill",
    ):
        again.prompt_ids("2 + 2?")


def test_a_bare_prompt_that_ends_with_the_thinking_tag_opens_it(chat: Chat) -> None:
    chat.tokenizer.chat_template = None
    bare = Chat(chat.tokenizer, ChatConfig(prefill="<think>\n"), STOP)
    ids = chat.tokenizer.encode("2</think>4")
    for end in ("<think>", "<think>\n"):
        prompt = f"Think in <think> </think> tags. Assistant: {end}"
        shown = bare.decode(bare.prompt_ids(prompt))
        assert shown == "Think in <think> </think> tags. Assistant: <think>\n"
        assert bare.text(ids, prompt=prompt) == "<think>\n2</think>4"
    assert bare.text(ids, prompt="Think in <think> tags.") == "<think>\n2</think>4"  # from the prefill
    assert bare.text(ids, with_opening=False, prompt=prompt) == "2</think>4"


HARMONY = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")


@pytest.mark.parametrize(
    "think", [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("\u25c1think\u25b7", "\u25c1/think\u25b7"), HARMONY]
)
def test_thinking_tags_that_are_special_tokens_are_kept(chat: Chat, think: tuple[str, str]) -> None:
    tokenizer = chat.tokenizer
    pieces = [piece for tag in think for piece in (re.findall(r"<\|\w+\|>", tag) or [tag])]
    tokenizer.add_special_tokens({"additional_special_tokens": [*dict.fromkeys(pieces)]})
    special = Chat(tokenizer, ChatConfig(think=think), STOP)
    message = f"{think[0]}2 and 2{think[1]}4<|im_end|>"
    ids = tokenizer.encode(message, add_special_tokens=False)
    assert any(token in special._special for token in ids[:1])
    assert special.text(ids) == "<think>2 and 2</think>4"
    assert special.text(tokenizer.encode("2 and 2")) == "2 and 2"
    opens = CHATML + ASSISTANT + think[0] + "\n" + END
    opening = Chat(tokenizer, ChatConfig(think=think, template=opens), STOP)
    assert opening.text(tokenizer.encode(f"2{think[1]}4")) == "<think>\n2</think>4"


# --- several templates, and errors ---


def test_several_named_templates(chat: Chat, tmp_path: Path) -> None:
    tokenizer = chat.tokenizer
    template = tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "tool_use": "TOOLS {{ messages[0].content }}"}
    tokenizer.save_pretrained(tmp_path / "named")
    settings = json.loads((tmp_path / "named" / "tokenizer_config.json").read_text())
    old = tmp_path / "old"  # in tokenizer_config.json, as earlier versions of transformers saved it
    tokenizer.save_pretrained(old)
    shutil.rmtree(old / "additional_chat_templates", ignore_errors=True)
    (old / "chat_template.jinja").unlink(missing_ok=True)
    listed = [
        {"name": "default", "template": template},
        {"name": "tool_use", "template": "TOOLS {{ messages[0].content }}"},
    ]
    (old / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": listed}))
    for path in (tmp_path / "named", old):
        named = load_tokenizer(str(path))
        default = Chat(named, ChatConfig(), STOP)
        assert default.decode(default.prompt_ids("hi")) == chat.decode(chat.prompt_ids("hi"))
        other = Chat(named, ChatConfig(template="tool_use"), STOP)
        assert other.decode(other.prompt_ids("hi")) == "TOOLS hi"
        with pytest.raises(
            RloraError, match=r"chat\.template = 'rag': can't be read .*several .*\(default, tool_use\)"
        ):
            Chat(named, ChatConfig(template="rag"), STOP)
    named.chat_template = {"tool_use": template, "rag": template}
    with pytest.raises(RloraError, match=r"model: .*\(tool_use, rag\), and none is the default; set chat\.templ"):
        Chat(named, ChatConfig(), STOP)


def test_a_template_in_a_file(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes(b"\xef\xbb\xbfQ: {{ messages[0].content }}")
    loaded = with_settings(chat, template=str(tmp_path / "a.jinja"))
    assert loaded.decode(loaded.prompt_ids("hi")) == "Q: hi"
    (tmp_path / "a.jinja").write_bytes(b"\xff\xff{{ messages }}")
    with pytest.raises(RloraError, match=r"chat\.template = .*a\.jinja': can't be read \(.*utf-8"):
        with_settings(chat, template=str(tmp_path / "a.jinja"))
    with pytest.raises(RloraError, match=r"chat\.template = .*: can't be read \(Is a directory\)"):
        with_settings(chat, template=str(tmp_path))


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
ALTERNATE = "{% if messages|length % 2 == 0 %}{{ raise_exception('no turn') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": NO_SYSTEM, "system": "Be brief."},
         r"^chat\.system = 'Be brief\.': the chat template rejects system messages \(System role not supported\)"),
        ({"template": ALTERNATE, "system": "Be brief."}, r"^chat\.system = 'Be brief\.': "),
        ({"template": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "system": "Be brief."},
         r"^chat\.system = 'Be brief\.': the chat template does not render system messages, .*unset"),
        ({"template": CHATML + "{{ raise_exception('no ' + mode) if mode }}", "template_args": {"mode": "x"}},
         r"^chat\.template_args = \{'mode': 'x'\}: the chat template fails with these arguments \(no x\); set"),
        ({"template": CHATML + "{{ 1 / n }}", "template_args": {"n": 0}}, r"rejects .* \(division by zero\)|_args"),
        ({"template": "{% for m in messages %}{{ m.content }}"},
         r"^chat\.template = .*: line 1 is not valid Jinja \(.*endfor.*\); fix the"),
        ({"template": "Q:\n{{ messages[0].content | nofilter }}"}, r"^chat\.template = .*: line 2 is not valid Jinja"),
        ({"template": "{{ 'Hello' }}"}, r"^chat\.template = .*: .*message 1 \(user\) is missing; fix the template"),
        ({"template": "{{ messages[0].content[0].text }}"}, r"message 1 \(user\) is missing|rejects"),
        ({"template": "{{ messages[0].content + 1 }}"}, r"^env: the model's chat template rejects .*or fix chat"),
    ],
)  # fmt: skip
def test_a_template_that_rejects_the_settings_names_the_field(
    chat: Chat, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(RloraError, match=message):
        with_settings(chat, **settings).prompt_ids("2 + 2?")


def test_a_message_that_the_template_leaves_out_raises_an_error(chat: Chat) -> None:
    last = with_settings(chat, template="{{ messages[-1].content }}")
    assert last.decode(last.prompt_ids("hi")) == "hi"
    few_shot = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "?"},
    ]
    with pytest.raises(RloraError, match=r"of the roles user, assistant, user, message 2 \(assistant\) is missing"):
        last.prompt_ids(few_shot)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{{ messages[-1].content }}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        ONE_TURN,
    ],
)
def test_a_template_that_does_not_show_a_reply_is_refused(chat: Chat, template: str) -> None:
    short = with_settings(chat, template=template)
    with pytest.raises(RloraError, match=r"does not render an env's reply|rejects"):
        short.check_replies()
    with pytest.raises(RloraError, match=r"does not render an env's reply|rejects"):
        short.reply_ids([{"role": "user", "content": "go on"}], (5, 2))


def test_a_reply_in_a_role_that_the_template_leaves_out_is_refused(chat: Chat) -> None:
    chat.check_replies()
    two = with_settings(chat, template="{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}")
    two.check_replies()
    with pytest.raises(RloraError, match=r"of the roles user, assistant, tool, message 3 \(tool\) is missing"):
        two.reply_ids([{"role": "tool", "content": "4"}], (5, 2))
    trims = with_settings(chat, template=QWEN3_HYBRID)  # it rewrites the policy's messages
    trims.check_replies()
    assert trims.decode(trims.reply_ids([{"role": "user", "content": "Sure?"}], (5,))) == (
        "<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


# --- special tokens around a bare prompt ---


@pytest.mark.parametrize("prefill", ["", "So"])
@pytest.mark.parametrize("single", ["$A", "<|im_start|> $A", "$A <|im_end|>", "<|im_start|> $A <|im_end|>",
                                    "$A <|im_end|> <|im_end|>"])  # fmt: skip
def test_a_bare_prompt_keeps_special_tokens_before_it_and_has_no_end_token(
    chat: Chat, single: str, prefill: str
) -> None:
    tokenizer = chat.tokenizer
    tokenizer.chat_template = None
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    bare = Chat(tokenizer, ChatConfig(prefill=prefill), STOP)
    begins = "<|im_start|>" if single.startswith("<") else ""
    assert bare.decode(bare.prompt_ids("1+1=")) == f"{begins}1+1={prefill}"
    assert bare.decode(bare.prompt_ids("<|im_start|>1+1=")) == f"<|im_start|>1+1={prefill}"  # once
    assert bare.prompt_ids("")[:1] != STOP


def test_a_chat_prompt_has_no_second_bos_nor_an_end_token(chat: Chat) -> None:
    tokenizer = chat.tokenizer
    expected = chat.prompt_ids("hi")
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=special
    )
    assert Chat(tokenizer, ChatConfig(), STOP).prompt_ids("hi") == expected
    assert chat.reply_ids("4", (5,)) == tuple(tokenizer.encode("4", add_special_tokens=False))
