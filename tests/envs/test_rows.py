"""Local data: values as in the file, errors with file and line, and all common layouts."""

import bz2
import gzip
import json
import lzma
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlora.envs.rows import read_rows
from rlora.envs.table import Table
from rlora.records import RloraError

datasets.disable_progress_bars()


def rows(path: Path, name: str | None = None, split: str = "train") -> list[dict[str, Any]]:
    return [dict(row) for row in read_rows("env_args.path", str(path), name, split)]


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


VALUES: list[Any] = [
    "2024-01-31", "2024-01-31T12:00:00", "2024-01-31 12:00:00Z", "12:30", "1.50", "007", "true", "NA", "", "4",
    "123456789012345678901234567890", 4, 4.0, 1.5, -0.0, 10**30, True, False, None, [], [1, "2", None], {"a": None},
    {"b": {"c": [1]}}, "\u2028 \x85 \x0b line", "\N{GRINNING FACE}", "a\r\nb",
]  # fmt: skip


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.jsonl.gz", "b.jsonl"])
def test_json_values_keep_their_type_and_text(name: str, tmp_path: Path) -> None:
    table = [{"value": value, "row": number} for number, value in enumerate(VALUES)] + [{"row": -1}]
    text = json.dumps(table) if name in ("a.json", "b.jsonl") else "\n".join(map(json.dumps, table))
    path = write(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text)
    assert repr(rows(path)) == repr(table)  # distinguishes 4, 4.0 and True


CELLS = ["007", "1.50", "NA", "None", "null", "NaN", "1e5", "true", "3.0", "4", "2024-01-31", " a ", "a, b", 'a "b"',
         "x\ny", "1" * 200_000, "123456789012345678901234567890", "-", "\u00e9"]  # fmt: skip


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_all_that_a_csv_has_is_text(name: str, separator: str, tmp_path: Path) -> None:
    quoted = [f'"{cell.replace(chr(34), chr(34) * 2)}"' if re.search(r'[,"\n]', cell) else cell for cell in CELLS]
    text = "".join(f"{cell}{separator}{number}\r\n" for number, cell in enumerate(quoted))
    path = write(tmp_path / name, f"\ufeffcell{separator}n\r\n{text}\r\n{separator}x\r\n")
    assert rows(path) == [{"cell": cell, "n": str(n)} for n, cell in enumerate(CELLS)] + [{"cell": None, "n": "x"}]


def test_parquet_values_keep_their_type(tmp_path: Path) -> None:
    table = [{"d": "2024-01-31", "n": 4, "x": 4.0, "m": [{"role": "user", "content": "hi"}]}, {"d": "007", "n": None}]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [table[0], table[1] | {"x": None, "m": None}]


def test_a_date_is_text_in_prompt_answer_and_columns(tmp_path: Path) -> None:
    row = {"day": "2024-01-31", "answer": "2024-02-01"}
    path = write(tmp_path / "day.jsonl", json.dumps(row) + "\n")
    (prompt,) = Table(str(path), template="Which weekday is {day}?").train()
    assert (prompt.text, prompt.answer, prompt.columns) == ("Which weekday is 2024-01-31?", "2024-02-01", row)


def test_json_with_a_byte_order_mark_or_crlf(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n\r\n{"a": "y"}\r\n')
    assert rows(path) == [{"a": "x"}, {"a": "y"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"version": "1", "data": [{"a": 1}, {"a": 2}]}', [{"a": 1}, {"a": 2}]),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', [{"a": 1}]),
        ('{"a": [1, 2], "b": ["x", "y"]}', [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"prompt": [{"role": "user", "content": "hi"}], "answer": "4"}',
         [{"prompt": [{"role": "user", "content": "hi"}], "answer": "4"}]),
        ('{\n "a": 1\n}', [{"a": 1}]),
        ('{"q": "2+2?", "steps": [{"s": 1}, {"s": 2}]}', [{"q": "2+2?", "steps": [{"s": 1}, {"s": 2}]}]),
        ('{"q": "?", "a": [{"s": 1}], "b": [{"t": 1}]}', [{"q": "?", "a": [{"s": 1}], "b": [{"t": 1}]}]),
        ('{"rows": [{"a": 1}, {"a": 2}]}', [{"a": 1}, {"a": 2}]),
        ('{"q": "x", "train": [{"a": 1}]}', [{"a": 1}]),
        ('{"prompt": [{"role": "user", "content": "hi"}]}', [{"prompt": [{"role": "user", "content": "hi"}]}]),
        ('{"prompt": [{"role": "user", "content": "hi"}], "choices": [4]}',
         [{"prompt": [{"role": "user", "content": "hi"}], "choices": [4]}]),
        ('{"prompt": [[{"role": "user", "content": "hi"}]], "n": [4]}',
         [{"prompt": [{"role": "user", "content": "hi"}], "n": 4}]),
        ('{"q": "?", "choices": ["a", "b"]}', [{"q": "?", "choices": ["a", "b"]}]),
    ],
)  # fmt: skip
def test_json_documents_of_other_shapes(text: str, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.json", text)) == expected


def test_one_line_of_json_lines_is_one_row(tmp_path: Path) -> None:
    row = {"question": "?", "choices": [{"label": "A"}, {"label": "B"}]}
    assert rows(write(tmp_path / "a.jsonl", json.dumps(row))) == [row]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', r"a\.jsonl, line 2: it is not JSON: Expecting value.*char 6"),
        ("a.jsonl", '{"a": 1}\n\n{"a": "x}\n', r"a\.jsonl, line 3: it is not JSON: .*string"),
        ("a.jsonl", '{"a": 1} {"a": 2}\n', r"a\.jsonl, line 1: it is not JSON: Extra data"),
        ("a.jsonl", "[1, 2]\n", r"a\.jsonl, row 0: 1 is not an object with columns"),
        ("a.jsonl", '"a"\n', r"a\.jsonl, line 1: 'a' is not an object with columns"),
        ("a.json", "[{", r"a\.json: it is not JSON: .*line 1 column"),
        ("a.json", "3", r"a\.json holds 3; write a list of objects"),
        ("a.json", '{"a": [{"x": 1}], "b": [{"x": 2}]}', r"several lists of rows \(a, b\); write each to a sep"),
        ("a.jsonl", '{"a": "ok"}\n{"prompt": "q \\ud83d end"}\n',
         r"a\.jsonl, line 2: column 'prompt' holds '\\ud83d', half of a character"),
        ("a.json", '[{"a": {"b": ["\\udc00"]}}]', r"a\.json, row 0: column 'a' holds '\\udc00'"),
        ("a.jsonl", '{"a": "ok"}\n{"a": "café"}\n'.encode("latin-1"),
         r"a\.jsonl, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("a.csv", "prompt,answer\ncafé,4\n".encode("latin-1"), r"a\.csv, line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", "prompt,answer\nq,4\n".encode("utf-16"), r"a\.csv is in UTF-16; save it as UTF-8"),
        ("a.csv", "prompt,answer\nq,4\n".encode("utf-16-le"),
         r"a\.csv is in UTF-16-LE without a byte order mark; save it as UTF-8"),
        ("a.jsonl", '{"prompt": "é"}\n'.encode("utf-16-be"), r"a\.jsonl is in UTF-16-BE without a byte order mark"),
        ("a.json", '[{"prompt": "你好世界你好世界"}]'.encode("utf-16-le"), r"a\.json is in UTF-16-LE without"),
        ("a.csv", "prompt,answer\nq,4\n".encode("utf-32"), r"a\.csv is in UTF-32; save it as UTF-8"),
        ("a.csv", "prompt,answer\nq,4\n".encode("utf-32-le"), r"a\.csv is in UTF-32-LE without a byte order mark"),
        ("a.csv", "prompt,answer\n" + "q,4\n" * 100 + "\0,5\n", r"a\.csv, line 102: a NUL byte; fix or drop the row"),
        ("a.jsonl", '{"a": 1}\n{"a": [1e400]}\n',
         r"a\.jsonl, line 2: the number 1e400 does not fit into a float; write it as a string"),
        ("a.json", '[{"a": -1E999}]', r"a\.json: the number -1E999 does not fit into a float"),
        ("a.jsonl", '{"a": 1.5e-400}', r"a\.jsonl, line 1: the number 1\.5e-400 does not fit into a float"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: the row has 1 cells, the header 2; .*quotes"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv, line 2: the row has 3 cells, the header 2"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv, line 1: two columns are named 'a'; rename one"),
        ("a.csv", 'a,b\n"x,2\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.parquet", b"PAR1 no",
         r"a\.parquet can't be read as parquet: .*[Pp]arquet.*; if it is .*truncated, download it again"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9],
         r"a\.jsonl\.gz can't be decompressed: .*end-of-stream.*; it is damaged or truncated, so download it again"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:12] + b"x" * 16, r"a\.csv\.gz can't be decompressed: "),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", r"Git LFS pointer.*git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", r"Git LFS pointer"),
        ("a.jsonl", '{"a": ' * 100_000, r"a\.jsonl, line 1: it is not JSON: .*recursion"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"a\.jsonl, line 1: it is not JSON: .*digits"),
        ("a.txt", "a", r"its extension is '\.txt'"),
        ("a.jsonl", "", "train has no rows; name a different"),
        ("a.jsonl", "\n \n", "train has no rows"),
        ("a.json", "", "train has no rows"),
        ("a.json", "[]", "train has no rows"),
        ("a.json", '{"data": []}', "train has no rows"),
        ("a.csv", "", "train has no rows"),
        ("a.csv", "prompt,answer\n", "train has no rows"),
        ("a.parquet", b"", "train has no rows"),
    ],
)  # fmt: skip
def test_a_file_that_can_not_be_used_says_why_and_where(
    name: str, data: str | bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(RloraError) as refused:
        rows(path)
    assert str(refused.value).startswith(f"env_args.path = {str(path)!r}: train ")
    assert re.search(message, str(refused.value))


def test_parquet_without_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(RloraError, match="train has no rows"):
        rows(tmp_path / "a.parquet")


def shard(path: Path, *values: object) -> None:
    if path.suffix == ".parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([{"v": value} for value in values]).to_parquet(path)
    elif path.suffix == ".csv":
        write(path, "v\n" + "".join(f"{value}\n" for value in values))
    else:
        write(path, "".join(json.dumps({"v": value}) + "\n" for value in values))


def values(path: Path, name: str | None = None, split: str = "train") -> list[Any]:
    return [row["v"] for row in rows(path, name, split)]


@pytest.mark.parametrize("end", ["parquet", "jsonl", "json", "csv"])
@pytest.mark.parametrize("pattern", ["data/{}-0000{}-of-00002", "{}-0000{}-of-00002", "{}/part-{}", "data/{}/{}"])
def test_shards_are_read_in_their_order(pattern: str, end: str, tmp_path: Path) -> None:
    for split, numbers in (("train", "abcd"), ("test", "efgh")):
        shard(tmp_path / f"{pattern.format(split, 0)}.{end}", *numbers[:2])
        shard(tmp_path / f"{pattern.format(split, 1)}.{end}", *numbers[2:])
    write(tmp_path / "README.md", "# About\n")
    assert values(tmp_path) == list("abcd")
    assert values(tmp_path, split="test") == list("efgh")
    with pytest.raises(RloraError, match=r"dev can't be read: there is no such split, only .*train"):
        values(tmp_path, split="dev")


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_dates_in_shards_stay_text(end: str, tmp_path: Path) -> None:
    shard(tmp_path / "data" / f"train-00000-of-00001.{end}", "2024-01-31", "007")
    assert values(tmp_path) == ["2024-01-31", "007"]


def test_a_missing_shard_is_reported(tmp_path: Path) -> None:
    shard(tmp_path / "data" / "train-00000-of-00003.parquet", 1)
    shard(tmp_path / "data" / "train-00002-of-00003.parquet", 3)
    with pytest.raises(RloraError, match=r"1 of 00003 shards are missing, such as train-00001-of-00003; download"):
        values(tmp_path)


def test_subsets_are_those_of_the_readme_or_directories(tmp_path: Path) -> None:
    for subset in ("main", "other"):
        for split in ("train", "test"):
            shard(tmp_path / subset / f"{split}-00000-of-00001.parquet", f"{subset} {split}")
    assert values(tmp_path, "main", "test") == ["main test"]
    part = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {1}/train-*\n"
    write(tmp_path / "README.md", f"---\nconfigs:\n{part.format('first', 'main')}{part.format('second', 'other')}---\n")
    assert values(tmp_path, "second") == ["other train"]
    with pytest.raises(RloraError, match=r"there is no subset 'third', only first, second"):
        values(tmp_path, "third")
    with pytest.raises(RloraError, match=r"(?s)Config name is missing.*first"):
        values(tmp_path)
    assert values(tmp_path, "main") == ["main train"]  # a directory, although README.md has a different name for it


def test_the_output_of_save_to_disk_is_read(tmp_path: Path) -> None:
    parts = {
        "train": datasets.Dataset.from_list([{"v": value} for value in "abc"]),
        "test": datasets.Dataset.from_list([{"v": "d"}]),
    }
    shuffled = datasets.DatasetDict(parts | {"train": parts["train"].select([2, 0])})  # stored as indices over all rows
    shuffled.save_to_disk(tmp_path / "dict")
    assert values(tmp_path / "dict") == ["c", "a"]
    assert values(tmp_path / "dict", split="test") == ["d"]
    with pytest.raises(RloraError, match=r"dev can't be read: there is no such split, only train, test"):
        values(tmp_path / "dict", split="dev")
    parts["test"].save_to_disk(tmp_path / "single")
    assert values(tmp_path / "single") == ["d"]
    with pytest.raises(RloraError, match="no such split, only train"):
        values(tmp_path / "single", split="test")


def test_a_directory_with_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"train can't be read \(.*data files\); use a hub id"):
        rows(tmp_path)
    shard(tmp_path / "train.jsonl", 1)
    shard(tmp_path / "train.csv", 1)
    with pytest.raises(RloraError, match="the directory has 2 files for this split"):
        rows(tmp_path)


def test_numbers_keep_the_text_of_their_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"x": 1.50, "y": 1e5, "z": 0.10000000000000001, "n": -7, "zero": -0.0}\n')
    (row,) = rows(path)
    assert [str(value) for value in row.values()] == ["1.50", "1e5", "0.10000000000000001", "-7", "-0.0"]
    assert repr(row) == "{'x': 1.5, 'y': 100000.0, 'z': 0.1, 'n': -7, 'zero': -0.0}"
    assert row["x"] + 1 == 2.5
    assert type(pickle.loads(pickle.dumps(row))["x"]) is float  # other processes receive plain floats
    assert json.dumps(row["x"]) == "1.5"


def test_infinity_that_a_file_spells_out_is_read(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.jsonl", '{"a": [Infinity, 0.0, 0e5]}')) == [{"a": [float("inf"), 0.0, 0.0]}]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:1]", "a"),
        ("train[1:3]", "bc"),
        ("train[-1:]", "d"),
        ("train[:50%]", "ab"),
        ("train[50%:]", "cd"),
        ("train[:1000]", "abcd"),
        ("train+test", "abcdef"),
        ("test + train[:-2]", "efab"),
        ("train[:25%]+test[1:]", "af"),
    ],
)
@pytest.mark.parametrize("layout", ["{}.jsonl", "data/{}-00000-of-00001.parquet", "{}/part.csv", "saved"])
def test_slices_and_sums_of_splits(layout: str, split: str, expected: str, tmp_path: Path) -> None:
    parts = {"train": "abcd", "test": "ef"}
    if layout == "saved":
        splits = {name: datasets.Dataset.from_dict({"v": list(values)}) for name, values in parts.items()}
        datasets.DatasetDict(splits).save_to_disk(tmp_path)
    else:
        for name, letters in parts.items():
            shard(tmp_path / layout.format(name), *letters)
    assert values(tmp_path, split=split) == list(expected)


def test_a_slice_of_one_file(tmp_path: Path) -> None:
    shard(tmp_path / "a.jsonl", *range(10))
    assert values(tmp_path / "a.jsonl", split="train[:30%]") == [0, 1, 2]
    with pytest.raises(
        RloraError, match=r"train\+test can't be read: .*a\.jsonl is one file, without splits; name one"
    ):
        values(tmp_path / "a.jsonl", split="train+test")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[:1", r"it is not a slice or a sum of splits \(.*\); write train\[:100\], train\[:10%\] or train\+test"),
        ("train[:200%]", r"not a slice or a sum of splits \(Percent slice"),
        ("train[1]", "not a slice or a sum of splits"),
        ("train+", "not a slice or a sum of splits"),
        ("train+dev", r"there is no such split, only .*train"),
        ("train[5:5]", r"train\[5:5\] has no rows"),
    ],
)
def test_a_slice_that_is_wrong_is_refused(split: str, message: str, tmp_path: Path) -> None:
    shard(tmp_path / "train.jsonl", *range(10))
    with pytest.raises(RloraError, match=message):
        values(tmp_path, split=split)


def described(path: Path, options: str, files: dict[str, str | bytes]) -> Path:
    """Write a directory like a hub's, whose README.md has these options in its `configs` block."""
    for name, data in files.items():
        write(path / name, data)
    lines = "".join(f"  {line}\n" for line in options.splitlines())
    write(path / "README.md", f"---\nconfigs:\n- config_name: default\n  data_files: {next(iter(files))}\n{lines}---\n")
    return path


@pytest.mark.parametrize(
    ("options", "name", "data", "expected"),
    [
        ("sep: ';'", "train.csv", "a;b\n007;x,y\n", [{"a": "007", "b": "x,y"}]),
        ("delimiter: '|'", "train.csv", "a|b\n1|2\n", [{"a": "1", "b": "2"}]),
        ("names: [a, b]", "train.csv", "1,2\n3,4\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        ("column_names: [a, b]\nheader: 0", "train.csv", "x,y\n3,4\n", [{"a": "3", "b": "4"}]),
        ("header: null", "train.csv", "1,2\n", [{"0": "1", "1": "2"}]),
        ("header: 1", "train.csv", "a title\na,b\n1,2\n", [{"a": "1", "b": "2"}]),
        ('quotechar: "\'"', "train.csv", "a,b\n'x,y',2\n", [{"a": "x,y", "b": "2"}]),
        ("skipinitialspace: true", "train.csv", "a, b\n1, 2\n", [{"a": "1", "b": "2"}]),
        ("encoding: latin-1", "train.csv", "a\ncafé\n".encode("latin-1"), [{"a": "café"}]),
        ("encoding: utf-16", "train.csv", "a\ncafé\n".encode("utf-16"), [{"a": "café"}]),
        ("encoding: cp1252", "train.jsonl", '{"a": "café"}\n'.encode("cp1252"), [{"a": "café"}]),
        ("field: items", "train.json", '{"data": [{"a": 0}], "items": [{"a": 1}]}', [{"a": 1}]),
        ("field: items", "train.json", '{"items": {"a": [1, 2]}}', [{"a": 1}, {"a": 2}]),
    ],
)  # fmt: skip
def test_options_of_the_readme_are_honoured(
    options: str, name: str, data: str | bytes, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert rows(described(tmp_path, options, {name: data})) == expected


def test_columns_of_parquet_that_the_readme_chooses(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"a": 1, "b": 2}]).to_parquet(tmp_path / "train.parquet")
    described(tmp_path, "columns: [b]", {"train.parquet": (tmp_path / "train.parquet").read_bytes()})
    assert rows(tmp_path) == [{"b": 2}]


@pytest.mark.parametrize(
    ("options", "name", "data", "message"),
    [
        ("thousands: '.'", "train.csv", "a\n1.000\n", r"README\.md sets thousands = '\.'; this option is not"),
        ("skiprows: 3", "train.csv", "a\n1\n", r"README\.md sets skiprows = 3"),
        ("na_values: [x]", "train.csv", "a\nx\n", r"README\.md sets na_values = \['x'\]"),
        ("sep: '\\s+'", "train.csv", "a b\n1 2\n", r"README\.md sets sep = '\\\\s\+'; .*one character"),
        ("encoding: nowhere", "train.csv", "a\n1\n", r"README\.md sets encoding = 'nowhere'.*; .*known to Python"),
        ("encoding: ascii", "train.csv", "a\ncafé\n", r"train\.csv, line 2: byte 0xc3 is not ascii"),
        ("field: items", "train.json", '{"data": []}', r"train\.json has no 'items', which README\.md sets as field"),
    ],
)  # fmt: skip
def test_an_option_of_the_readme_that_can_not_be_honoured_is_refused(
    options: str, name: str, data: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RloraError, match=message):
        rows(described(tmp_path, options, {name: data}))


def test_a_readme_that_only_names_the_files_changes_nothing(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"train.csv": "v\n007\n"}
    assert values(described(tmp_path, "", files)) == ["007"]
    assert values(tmp_path, "main") == ["007"]  # GSM8K names a subset even if there are none


def zipped(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_zip_in_a_directory_is_read(tmp_path: Path) -> None:
    files = {"b/2.jsonl": '{"v": "007"}\n', "b/1.jsonl": '{"v": 1}\n', "__MACOSX/1.jsonl": "x", ".hid.jsonl": "x"}
    zipped(tmp_path / "train.zip", **files)
    assert values(tmp_path) == [1, "007"]
    zipped(tmp_path / "train.zip", **{"1.jsonl": '{"v": 2}\n', "about.txt": "x"})
    assert values(tmp_path) == [2]  # not a cached copy of the earlier file


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": '{"v": }\n'}, r"train\.zip/a\.jsonl, line 1: it is not JSON"),
        (
            {"a.jsonl": '{"v": 1}\n', "b.txt": "v", "b.csv": "v\n1\n"},
            r"train\.zip contains files of several formats \(csv, json\)",
        ),
    ],
)
def test_errors_in_a_zip_name_its_file(files: dict[str, str], message: str, tmp_path: Path) -> None:
    zipped(tmp_path / "train.zip", **files)
    with pytest.raises(RloraError, match=message):
        rows(tmp_path)


def test_a_zip_that_is_cut_off_is_named(tmp_path: Path) -> None:
    zipped(tmp_path / "train.zip", **{"a.jsonl": '{"v": 1}\n'})
    write(tmp_path / "train.zip", (tmp_path / "train.zip").read_bytes()[:-30])
    with pytest.raises(RloraError, match=r"train\.zip can't be decompressed: .*; it is damaged or truncated, so"):
        rows(tmp_path)


COMPRESSED = [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]


@pytest.mark.parametrize(("end", "compress"), COMPRESSED)
def test_changed_compressed_files_of_a_directory_are_read_again(
    end: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    for value in ("007", "008"):
        write(tmp_path / f"train.csv.{end}", compress(f"v\n{value}\n".encode()))
        assert values(tmp_path) == [value]


@pytest.mark.parametrize(("end", "compress"), COMPRESSED)
def test_a_truncated_compressed_file_is_reported_every_time(
    end: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    numbers = "".join(f"{number**5}\n" for number in range(5000))
    write(tmp_path / f"train.csv.{end}", compress(f"v\n{numbers}".encode())[:-100])
    for _ in range(2):  # a partial result is not cached
        with pytest.raises(
            RloraError, match=rf"train\.csv\.{end} can't be decompressed: .*; it is damaged or truncated"
        ):
            values(tmp_path)


def test_a_shard_that_is_cut_off_is_named(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / f"train-0000{number}-of-00002.parquet", number)
    broken = tmp_path / "train-00001-of-00002.parquet"
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(
        RloraError,
        match=r"train-00001-of-00002\.parquet can't be read as parquet: .*truncated, download it again",
    ):
        values(tmp_path)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train_00000_of_00002"], "train_00001_of_00002"),
        (["train_00001_of_00002"], "train_00000_of_00002"),
        (["train-00000-of-00002_x"], "train-00001-of-00002"),
        (["train.00001-of-00003", "train.00003-of-00003"], "train.00002-of-00003"),  # counted from 1
    ],
)
def test_missing_shards_of_other_naming_schemes_are_reported(names: list[str], missing: str, tmp_path: Path) -> None:
    for name in names:
        shard(tmp_path / f"{name}.jsonl", 1)
    with pytest.raises(RloraError, match=rf"1 of \d+ shards are missing, such as {re.escape(missing)}; download them"):
        values(tmp_path)


def test_shards_may_be_counted_from_one(tmp_path: Path) -> None:
    for number in (1, 2):
        shard(tmp_path / f"train_0000{number}_of_00002.jsonl", number)
    assert values(tmp_path) == [1, 2]
