from array import array
from dataclasses import replace

import pyarrow
import pytest
from conftest import episode, group
from pyarrow import parquet

from rlora.records import Episode, Group, Kept, Prompt, Trained, Version
from rlora.run import episodes


def test_encode_and_decode_are_inverse(groups: list[Group]) -> None:
    prompt = Prompt([{"role": "user", "content": "two \ud800 halves?"}], {"a": [1, None]}, (4, 5), {"level": "hard"})
    played = Episode(
        completion_ids=(1, 2, 3),
        behaviour_logprobs=(-0.1, 0.0, -1 / 3),  # 1/3 is not exact in binary: tests every bit
        finish_reason="context",
        version=Version("run", 7, "0123456789abcdef"),
        text="the last \ud800",
        reward=0.1,
        sampled_mask=(True, False, True),
        messages=({"role": "assistant", "content": "é"}, {"role": "tool", "content": "4"}),
        state={"tries": 2},
        status="wrong",
        parts={"f": 0.1, "f/extra": 2.0},
    )
    unscored = replace(played, reward=None, status="", parts={})
    written = [*groups, Group(prompt, (played, unscored))]
    assert episodes.decode(episodes.encode(written), "run") == written
    assert episodes.decode(episodes.encode([]), "run") == []


def test_kept_tokens_are_stored_where_there_are_some(groups: list[Group]) -> None:
    kept = Kept(array("i", [3, 1, 48_000]).tobytes(), (2, 0, 1))
    truncated = replace(groups[0], episodes=(replace(groups[0].episodes[0], kept=kept), *groups[0].episodes[1:]))
    written = [truncated, *groups[1:]]
    assert episodes.decode(episodes.encode(written), "run") == written
    plain = parquet.read_table(pyarrow.BufferReader(episodes.encode(groups)))
    assert not [name for name in plain.column_names if name.startswith("kept")]


def test_what_an_update_computed_is_stored_beside_the_episodes(groups: list[Group]) -> None:
    trained = {
        (0, 1): Trained(array("f", [0.5, -1.0]).tobytes(), array("f", [-0.1, -2.0]).tobytes()),
        (2, 0): Trained(array("f", [0.25]).tobytes(), b""),
    }
    content = episodes.encode(groups, trained)
    assert episodes.decode(content, "run") == groups
    assert episodes.decode_training(content) == trained
    assert episodes.decode_training(episodes.encode(groups)) == {}


def test_a_file_of_a_release_without_digests_is_read() -> None:
    one = group([1], replace(episode([2], 1.0), version=Version("run", 7, "0123456789abcdef")), episode([3], 0.0))
    table = parquet.read_table(pyarrow.BufferReader(episodes.encode([one])))
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table.drop_columns(["digest"]), sink)
    (read,) = episodes.decode(sink.getvalue().to_pybytes(), "run")
    assert [episode.version for episode in read.episodes] == [Version("run", 7, ""), Version("run", 0, "")]
    assert read == replace(one, episodes=(replace(one.episodes[0], version=Version("run", 7)), one.episodes[1]))


def test_an_answer_that_json_lacks_becomes_text() -> None:
    one = Group(Prompt("?", answer=1 + 2j, token_ids=(1,)), (episode([2]),))
    assert episodes.decode(episodes.encode([one]), "run")[0].prompt.answer == "(1+2j)"


@pytest.mark.parametrize("tokens", [0, 1, 3000])
def test_the_file_is_small(tokens: int) -> None:
    one = group([1] * 50, *[episode([7] * tokens, logprobs=[-0.5] * tokens) for _ in range(8)])
    assert len(episodes.encode([one])) < 20_000
    assert episodes.decode(episodes.encode([one]), "run") == [one]
