"""Local data: every value as it is in its file, every fault with its file and line, every usual layout."""

import gzip
import json
import re
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


def written(path: Path, data: str | bytes) -> Path:
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
    path = written(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text)
    assert repr(rows(path)) == repr(table)  # and 4 is not 4.0, nor True 1


CELLS = ["007", "1.50", "NA", "None", "null", "NaN", "1e5", "true", "3.0", "4", "2024-01-31", " a ", "a, b", 'a "b"',
         "x\ny", "1" * 200_000, "123456789012345678901234567890", "-", "\u00e9"]  # fmt: skip


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_all_that_a_csv_has_is_text(name: str, separator: str, tmp_path: Path) -> None:
    quoted = [f'"{cell.replace(chr(34), chr(34) * 2)}"' if re.search(r'[,"\n]', cell) else cell for cell in CELLS]
    text = "".join(f"{cell}{separator}{number}\r\n" for number, cell in enumerate(quoted))
    path = written(tmp_path / name, f"\ufeffcell{separator}n\r\n{text}\r\n{separator}x\r\n")
    assert rows(path) == [{"cell": cell, "n": str(n)} for n, cell in enumerate(CELLS)] + [{"cell": None, "n": "x"}]


def test_parquet_values_keep_their_type(tmp_path: Path) -> None:
    table = [{"d": "2024-01-31", "n": 4, "x": 4.0, "m": [{"role": "user", "content": "hi"}]}, {"d": "007", "n": None}]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [table[0], table[1] | {"x": None, "m": None}]


def test_a_date_is_text_in_prompt_answer_and_columns(tmp_path: Path) -> None:
    row = {"day": "2024-01-31", "answer": "2024-02-01"}
    path = written(tmp_path / "day.jsonl", json.dumps(row) + "\n")
    (prompt,) = Table(str(path), template="Which weekday is {day}?").train()
    assert (prompt.text, prompt.answer, prompt.columns) == ("Which weekday is 2024-01-31?", "2024-02-01", row)


def test_json_with_a_byte_order_mark_or_crlf(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n\r\n{"a": "y"}\r\n')
    assert rows(path) == [{"a": "x"}, {"a": "y"}]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"version": "1", "data": [{"a": 1}, {"a": 2}]}', [{"a": 1}, {"a": 2}]),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', [{"a": 1}]),
        ('{"a": [1, 2], "b": ["x", "y"]}', [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"prompt": [{"role": "user", "content": "hi"}], "answer": "4"}',
         [{"prompt": [{"role": "user", "content": "hi"}], "answer": "4"}]),
        ('{\n "a": 1\n}', [{"a": 1}]),
    ],
)  # fmt: skip
def test_json_documents_of_other_shapes(text: str, wanted: list[dict[str, Any]], tmp_path: Path) -> None:
    assert rows(written(tmp_path / "a.json", text)) == wanted


def test_one_line_of_json_lines_is_one_row(tmp_path: Path) -> None:
    row = {"question": "?", "choices": [{"label": "A"}, {"label": "B"}]}
    assert rows(written(tmp_path / "a.jsonl", json.dumps(row))) == [row]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', r"a\.jsonl, line 2: it is not JSON: Expecting value.*char 6"),
        ("a.jsonl", '{"a": 1}\n\n{"a": "x}\n', r"a\.jsonl, line 3: it is not JSON: .*string"),
        ("a.jsonl", '{"a": 1} {"a": 2}\n', r"a\.jsonl, line 1: it is not JSON: Extra data"),
        ("a.jsonl", "[1, 2]\n", r"a\.jsonl, row 0: 1 is no object with columns"),
        ("a.jsonl", '"a"\n', r"a\.jsonl, line 1: 'a' is no object with columns"),
        ("a.json", "[{", r"a\.json: it is not JSON: .*line 1 column"),
        ("a.json", "3", r"a\.json holds 3; write a list of objects"),
        ("a.json", '{"a": [{"x": 1}], "b": [{"x": 2}]}', r"several lists of rows \(a, b\); give each a file"),
        ("a.jsonl", '{"a": "ok"}\n{"prompt": "q \\ud83d end"}\n',
         r"a\.jsonl, line 2: column 'prompt' holds '\\ud83d', half of a character"),
        ("a.json", '[{"a": {"b": ["\\udc00"]}}]', r"a\.json, row 0: column 'a' holds '\\udc00'"),
        ("a.jsonl", '{"a": "ok"}\n{"a": "café"}\n'.encode("latin-1"),
         r"a\.jsonl, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("a.csv", "prompt,answer\ncafé,4\n".encode("latin-1"), r"a\.csv, line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", "prompt,answer\nq,4\n".encode("utf-16"), r"a\.csv is in UTF-16; save it as UTF-8"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: the row has 1 cells, the header 2; .*quotes"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv, line 2: the row has 3 cells, the header 2"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv, line 1: two columns are called 'a'; rename one"),
        ("a.csv", 'a,b\n"x,2\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.parquet", b"PAR1 no", r"train can't be read \(.*[Pp]arquet"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", r"pointer of Git LFS.*git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", r"pointer of Git LFS"),
        ("a.jsonl", '{"a": ' * 100_000, r"a\.jsonl, line 1: it is not JSON: .*recursion"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"a\.jsonl, line 1: it is not JSON: .*digits"),
        ("a.txt", "a", r"it ends with '\.txt'"),
        ("a.jsonl", "", "train has no rows; fill it"),
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
    path = written(tmp_path / name, data)
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
        written(path, "v\n" + "".join(f"{value}\n" for value in values))
    else:
        written(path, "".join(json.dumps({"v": value}) + "\n" for value in values))


def values(path: Path, name: str | None = None, split: str = "train") -> list[Any]:
    return [row["v"] for row in rows(path, name, split)]


@pytest.mark.parametrize("end", ["parquet", "jsonl", "json", "csv"])
@pytest.mark.parametrize("pattern", ["data/{}-0000{}-of-00002", "{}-0000{}-of-00002", "{}/part-{}", "data/{}/{}"])
def test_shards_are_read_in_their_order(pattern: str, end: str, tmp_path: Path) -> None:
    for split, numbers in (("train", "abcd"), ("test", "efgh")):
        shard(tmp_path / f"{pattern.format(split, 0)}.{end}", *numbers[:2])
        shard(tmp_path / f"{pattern.format(split, 1)}.{end}", *numbers[2:])
    written(tmp_path / "README.md", "# About\n")
    assert values(tmp_path) == list("abcd")
    assert values(tmp_path, split="test") == list("efgh")
    with pytest.raises(RloraError, match=r"dev can't be read: there is no such split; there are .*train"):
        values(tmp_path, split="dev")


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_dates_in_shards_stay_text(end: str, tmp_path: Path) -> None:
    shard(tmp_path / "data" / f"train-00000-of-00001.{end}", "2024-01-31", "007")
    assert values(tmp_path) == ["2024-01-31", "007"]


def test_a_shard_that_is_missing_is_told(tmp_path: Path) -> None:
    shard(tmp_path / "data" / "train-00000-of-00003.parquet", 1)
    shard(tmp_path / "data" / "train-00002-of-00003.parquet", 3)
    with pytest.raises(RloraError, match=r"1 of its 00003 shards are missing, such as train-00001-of-00003; get"):
        values(tmp_path)


def test_subsets_are_those_of_the_readme_or_directories(tmp_path: Path) -> None:
    for subset in ("main", "other"):
        for split in ("train", "test"):
            shard(tmp_path / subset / f"{split}-00000-of-00001.parquet", f"{subset} {split}")
    assert values(tmp_path, "main", "test") == ["main test"]
    part = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {1}/train-*\n"
    written(
        tmp_path / "README.md", f"---\nconfigs:\n{part.format('first', 'main')}{part.format('second', 'other')}---\n"
    )
    assert values(tmp_path, "second") == ["other train"]
    with pytest.raises(RloraError, match=r"no subset is called 'third'; there are first, second"):
        values(tmp_path, "third")
    with pytest.raises(RloraError, match=r"(?s)Config name is missing.*first"):
        values(tmp_path)
    assert values(tmp_path, "main") == ["main train"]  # a directory, though README.md calls it otherwise


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    parts = {
        "train": datasets.Dataset.from_list([{"v": value} for value in "abc"]),
        "test": datasets.Dataset.from_list([{"v": "d"}]),
    }
    shuffled = datasets.DatasetDict(parts | {"train": parts["train"].select([2, 0])})  # indices over all rows
    shuffled.save_to_disk(tmp_path / "dict")
    assert values(tmp_path / "dict") == ["c", "a"]
    assert values(tmp_path / "dict", split="test") == ["d"]
    with pytest.raises(RloraError, match=r"dev can't be read: there is no such split; there are train, test"):
        values(tmp_path / "dict", split="dev")
    parts["test"].save_to_disk(tmp_path / "single")
    assert values(tmp_path / "single") == ["d"]
    with pytest.raises(RloraError, match="no such split; there are train"):
        values(tmp_path / "single", split="test")


def test_a_directory_with_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"train can't be read \(.*data files\); give a hub id"):
        rows(tmp_path)
    shard(tmp_path / "train.jsonl", 1)
    shard(tmp_path / "train.csv", 1)
    with pytest.raises(RloraError, match="the directory has 2 files for it"):
        rows(tmp_path)
