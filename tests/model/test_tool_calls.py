"""The forms in which models write tool calls."""

import json

import pytest

from rlora.model.tool_calls import FORMS, ToolCall, typed, without_thoughts

CALL = ToolCall("multiply", {"a": 347, "b": 28})


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("hermes", '<tool_call>\n{"name": "multiply", "arguments": {"a": 347, "b": 28}}\n</tool_call>', [CALL]),
        ("hermes", 'First:<tool_call>{"name": "multiply", "arguments": {"a": 347, "b": 28}}</tool_call> done', [CALL]),
        ("hermes", '<tool_call>{"arguments": {"a": 347, "b": 28}, "name": "multiply"}', [CALL]),  # the end is missing
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', [ToolCall("now")]),
        ("hermes", '<tool_call>{"name": "multiply", "arguments": "{\\"a\\": 347, \\"b\\": 28}"}</tool_call>', [CALL]),
        ("hermes", '<tool_call>{"name": "run", "arguments": {"code": "a\nb"}}</tool_call>',
         [ToolCall("run", {"code": "a\nb"})]),
        ("hermes", "The answer is 9716.", []),
        ("hermes", '{"name": "multiply", "arguments": {}}', []),
        ("xml", "<tool_call>\n<function=multiply>\n<parameter=a>\n347\n</parameter>\n<parameter=b>\n28\n</parameter>\n"
         "</function>\n</tool_call>", [ToolCall("multiply", {"a": "347", "b": "28"})]),
        ("xml", "<tool_call><function=run><parameter=code>\nif a:\n  b\n</parameter></function></tool_call>",
         [ToolCall("run", {"code": "if a:\n  b"})]),
        ("json", '{"name": "multiply", "parameters": {"a": 347, "b": 28}}', [CALL]),
        ("json", '<|python_tag|>{"name": "multiply", "parameters": {"a": 347, "b": 28}}', [CALL]),
        ("json", '{"name": "multiply", "parameters": {"a": 347, "b": 28}}; {"name": "now", "parameters": {}}',
         [CALL, ToolCall("now")]),
        ("json", 'I call {"name": "multiply"}', []),
        ("json", ' [{"name": "multiply", "arguments": {"a": 347, "b": 28}, "id": "a"}, {"name": "now"}] ',
         [CALL, ToolCall("now")]),
        ("json", '```json\n{"name": "multiply", "arguments": {"a": 347, "b": 28}}\n```', [CALL]),
        ("json", '[{"type": "function", "function": {"name": "multiply", "arguments": {"a": 347, "b": 28}}}]', [CALL]),
        ("json", '{"name": "multiply", "arguments": {"a": 347, "b": 28}}', [CALL]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [ToolCall("now")]),
        ("json", '{"type": "function", "function": "multiply", "parameters": {"a": 347, "b": 28}}', [CALL]),
        ("hermes", '<tool_call>{"name": "now", "arguments": ""}</tool_call>', [ToolCall("now")]),
        ("json", '{"name": "Bob", "age": 3}', []),
        ("json", '[1] means the "name".', []),
        ("json", '{"answer": 9716}', []),
        ("json", "[1, 2, 3]", []),
        ("json", "[not JSON", []),
        ("json", "{}", []),
        ("json", "{'name': 'Bob', 'age': 3}", []),
        ("json", '[See the keys "name": and "input": below]', []),
        ("json", "", []),
    ],
)  # fmt: skip
def test_calls_in_each_form(form: str, text: str, calls: list[ToolCall]) -> None:
    assert list(FORMS[form](text)) == calls


def test_parallel_calls_keep_their_order() -> None:
    text = '<tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>\n<tool_call>{"name": "a"}'
    assert [call.name for call in FORMS["hermes"](text)] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("form", "text", "fault"),
    [
        ("hermes", '<tool_call>{"name": "multiply", "arguments": {"a": 347</tool_call>', "not valid JSON"),
        ("hermes", "<tool_call></tool_call>", "not valid JSON"),
        ("hermes", '<tool_call>["multiply", 1]</tool_call>', 'must be {"name": ..., "arguments": {...}}'),
        ("hermes", '<tool_call>{"name": 7}</tool_call>', 'must be {"name"'),
        (
            "hermes",
            '<tool_call>{"name": "multiply", "arguments": [347, 28]}</tool_call>',
            "must be an object",
        ),
        ("hermes", '<tool_call>{"name": "multiply", "a": 347}</tool_call>', "'a' is no key of a call"),
        ("hermes", '<tool_call>{"name": "a", "name": "b"}</tool_call>', "a key twice"),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 60 + "]" * 60 + "}}</tool_call>",
            "50 levels",
        ),
        ("xml", "<tool_call><function=f><parameter=n>1</function></tool_call>", "each parameter must be"),
        (
            "xml",
            "<tool_call><function=f><parameter=n>1</parameter><parameter=n>2</parameter></function></tool_call>",
            "once",
        ),
        ("hermes", "<tool_call>" + "[" * 100_000, "not valid JSON"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ' + "1" * 5000 + "}}</tool_call>", "not valid JSON"),
        ("xml", '<tool_call>{"name": "multiply"}</tool_call>', "must be <function=NAME>"),
        ("json", '{"name": "multiply", "parameters": {"a": 347', "not valid JSON"),
        ("json", '{"name": "multiply", "parameters": 347}', "must be an object"),
        ("json", '{"name": "multiply", "parameters": {"a": 1}, "thought": "So."}', "'thought' is no key of a call"),
        *(
            ("hermes", f'<tool_call>{{"name": "now", "arguments": {value}}}</tool_call>', "must be an object")
            for value in ("0", "false", "[]")
        ),
        ("json", '[{"name": "multiply", "arguments": {"a": 347, "b": 28}}', "not valid JSON"),
        ("json", "{'name': 'multiply', 'parameters': {'a': 347, 'b': 28}}", "not valid JSON"),
        ("json", '{"parameters": {"a": 347, "b": 28}, "name": "multiply"', "not valid JSON"),
        ("json", '{"name": "multiply", "args": {"a": 347}}', "'args' is no key of a call"),
        ("json", '{"name": "multiply", "input": {"a": 347}}', "'input' is no key of a call"),
        ("json", "```\n{'name': 'multiply', 'parameters': {}}\n```", "not valid JSON"),
    ],
)
def test_a_malformed_call_has_a_fault(form: str, text: str, fault: str) -> None:
    (call,) = FORMS[form](text)
    assert fault in call.fault


def test_whitespace_in_a_fence_takes_no_time() -> None:
    assert FORMS["json"]("```json" + "\n" * 100_000 + "x") == []
    for text in (" " * 1_000_000, "[" * 1_000_000, "{" + " " * 1_000_000, "{'name'" + " " * 100_000):
        assert without_thoughts(text + "<think>") in (text, text + "<think>")
        assert all("not valid JSON" in call.fault for call in FORMS["json"](text))


@pytest.mark.parametrize(("unit", "end"), [
    ("<function=", "</function>"), ("<function=a>", ""), ("<function=a><parameter=", "</parameter></function>"),
    ("<function=a><parameter=b>", ""), ("</parameter>", "</function>"),
])  # fmt: skip
def test_repeated_tags_take_no_time(unit: str, end: str) -> None:
    (call,) = FORMS["xml"]("<tool_call>" + unit * 50_000 + end)  # minutes, if the time were quadratic
    assert call.fault


def test_a_function_per_block_or_several() -> None:
    one, two = ("<function=f><parameter=n>1</parameter></function>", "<function=g></function>")
    assert FORMS["xml"](f"<tool_call>{one}\n{two}</tool_call>") == [ToolCall("f", {"n": "1"}), ToolCall("g")]


def test_one_malformed_call_leaves_the_others() -> None:
    calls = FORMS["hermes"]('<tool_call>{"name": "a"}</tool_call><tool_call>{"name"</tool_call>')
    assert [bool(call.fault) for call in calls] == [False, True]


def test_text_becomes_a_value_of_the_type_in_the_schema() -> None:
    properties = {
        "a": {"type": "integer"}, "b": {"type": "array"}, "c": {"type": "string"}, "e": {"type": "integer"},
        "f": {"type": "boolean"}, "g": {"anyOf": [{"type": "integer"}, {"type": "array"}]},
        "h": {"type": "string", "nullable": True}, "i": {"type": ["integer", "null"]},
    }  # fmt: skip
    schema = {"function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    texts = {"a": "7", "b": "[1]", "c": "7", "d": "7", "e": "seven", "f": "False", "g": "[1]", "h": "None", "i": "3"}
    values = {"a": 7, "b": [1], "c": "7", "d": "7", "e": "seven", "f": False, "g": [1], "h": None, "i": 3}
    assert typed(ToolCall("f", texts), schema).arguments == values
    nulls = {"function": {"name": "f", "parameters": {"properties": {"a": {"type": None, "anyOf": None}}}}}
    assert typed(ToolCall("f", {"a": "7"}), nulls).arguments == {"a": "7"}


def test_the_word_null_is_text_where_the_form_or_an_enum_says_so() -> None:
    properties = {
        "color": {"type": "string", "nullable": True}, "size": {"enum": ["none", "big"], "type": ["string", "null"]},
        "count": {"type": ["integer", "null"]},
    }  # fmt: skip
    schema = {"function": {"name": "paint", "parameters": {"type": "object", "properties": properties}}}
    texts = {"color": "None", "size": "none", "count": "null"}
    in_json = f'{{"name": "paint", "arguments": {json.dumps(texts)}}}'
    in_xml = "".join(f"<parameter={name}>{value}</parameter>" for name, value in texts.items())
    for form, text, color in (
        ("hermes", f"<tool_call>{in_json}</tool_call>", "None"),
        ("json", in_json, "None"),
        ("xml", f"<tool_call><function=paint>{in_xml}</function></tool_call>", None),
    ):
        (call,) = FORMS[form](text)
        assert typed(call, schema).arguments == {"color": color, "size": "none", "count": None}
