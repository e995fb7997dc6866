"""Text to tokens and back, with the demo model's own template."""

import pytest

from rlora.base import load_tokenizer
from rlora.chat import Chat
from rlora.config import ChatConfig
from rlora.records import RloraError

STOP = (2,)  # <|im_end|>


@pytest.fixture
def chat(demo: str) -> Chat:
    return Chat(load_tokenizer(demo), ChatConfig(), STOP)


def with_settings(chat: Chat, **settings: object) -> Chat:
    return Chat(chat.tokenizer, ChatConfig(**settings), STOP)  # type: ignore[arg-type]


def test_a_string_is_a_user_message_where_there_is_a_template_and_bare_text_where_there_is_none(chat: Chat) -> None:
    assert chat.shown(chat.prompt_ids("2 + 2?")).endswith("user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    assert "Be brief." in chat.shown(chat.prompt_ids(messages))
    chat.tokenizer.chat_template = None
    bare = Chat(chat.tokenizer, ChatConfig(), STOP)
    assert bare.shown(bare.prompt_ids("2 + 2?")) == "2 + 2?"
    for unfit in (lambda: bare.prompt_ids(messages), lambda: bare.reply_ids(messages, (5,))):
        with pytest.raises(RloraError, match="no chat template"):
            unfit()


def test_the_config_gives_a_system_message_where_the_env_gives_none(chat: Chat) -> None:
    brief = with_settings(chat, system="Be brief.")
    assert brief.shown(brief.prompt_ids("2 + 2?")).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "2 + 2?"}]
    assert "Be brief." not in brief.shown(brief.prompt_ids(own))


def test_what_a_message_is_made_to_begin_with_is_in_the_prompt_and_in_its_text(chat: Chat) -> None:
    thinking = with_settings(chat, prefill="<reason>", think=("<reason>", "</reason>"))
    assert thinking.shown(thinking.prompt_ids("2 + 2?")).endswith("assistant\n<reason>")
    ids = chat.tokenizer.encode("two twos</reason>4")
    assert thinking.text(ids) == "<think>two twos</think>4"
    assert thinking.text(ids, whole=False) == "two twos</think>4"


def test_a_template_of_ones_own_and_what_it_takes(chat: Chat) -> None:
    own = with_settings(
        chat, template="{{ messages[0].content }}{% if loud %}!{% endif %}", template_args={"loud": True}
    )
    assert own.shown(own.prompt_ids("hello")) == "hello!"
    with pytest.raises(RloraError, match=r"chat\.template = 'none\.jinja': can't be read"):
        with_settings(chat, template="none.jinja")


def test_messages_that_the_template_refuses_are_told(chat: Chat) -> None:
    strict = with_settings(chat, template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(RloraError, match=r"takes no .*'2 \+ 2\?'.* \(System role not supported\)"):
        strict.prompt_ids("2 + 2?")


@pytest.mark.parametrize("ended", [True, False])
def test_a_reply_of_messages_follows_as_in_a_conversation_whether_or_not_the_policy_has_ended_its_own(
    chat: Chat, ended: bool
) -> None:
    question, said = [{"role": "user", "content": "2 + 2?"}], [{"role": "user", "content": "Are you sure?"}]
    completion = tuple(chat.tokenizer.encode("It is 4.")) + STOP * ended
    ids = chat.prompt_ids(question) + completion + chat.reply_ids(said, completion)
    whole = chat.prompt_ids([*question, {"role": "assistant", "content": "It is 4."}, *said])
    assert chat.shown(ids) == chat.shown(whole)
    assert ids == whole  # here text and tokens agree; nothing was made again from text


def test_a_reply_of_a_string_goes_on_in_the_message(chat: Chat) -> None:
    assert chat.reply_ids(" 9716>>", (5,)) == tuple(chat.tokenizer.encode(" 9716>>"))
