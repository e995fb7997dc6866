import base64
import gzip
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import report_run
from report_run import write_run
from transformers import AutoTokenizer
from upath import UPath

from rlora.records import BASE, RloraError
from rlora.report.charts import charts
from rlora.report.completions import read_completions, spread
from rlora.report.page import MOST_RUNS, render
from rlora.report.report import watch, write_report
from rlora.report.runs import read_data
from rlora.report.weights import heat_maps

LIMIT = 2**22


def chunk(page: str, name: str) -> Any:
    """The content of a compressed chunk of the page."""
    found = re.search(rf'id="chunk-{name}">([^<]*)<', page)
    assert found, name
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def page_of(*runs: UPath) -> str:
    return render([read_data(run) for run in runs], LIMIT)


def test_a_page_contains_metrics_weights_completions_and_config(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "sums"))
    data = chunk(page, "data")
    (run,) = data["runs"]
    assert run["name"] == "sums"
    assert run["columns"]["reward/mean"] == [*(round(0.1 + 0.8 * step / 6, 5) for step in range(6)), None]
    assert run["columns"]["accuracy/held_out"] == [0.25, None, None, None, None, None, 0.75]
    assert run["columns"]["phase/update: gradient"] == [0.9] * 6 + [None]
    phases = [values[0] for name, values in run["columns"].items() if name.startswith("phase/")]
    assert sum(phases) == pytest.approx(4.0)  # time/step
    assert run["weights"]["figures"]["norm"][0] == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    assert "rank_used" not in run["weights"]["figures"]  # always 1 at rank 1
    titles = [chart["title"] for chart in data["charts"]]
    assert {"Reward", "KL divergence", "Where a step's time goes", "Size of the update"} <= {*titles}
    assert "Rank in use" not in titles
    assert "Explained variance" not in titles
    index, groups = chunk(page, "completions-0"), chunk(page, "completions-0-5")
    assert sorted(index["prompts"], key=int) == ["0", "1", "2", "3", "4", "5"]
    assert index["prompts"]["0"] == index["prompts"]["2"] != index["prompts"]["1"]
    assert groups[0]["prompt"] == [["user", "What is 0 + 1?"]]
    episode = groups[0]["episodes"][0]
    assert (episode["reward"], episode["adv"]) in ((1.0, 0.5), (0.0, -0.5))
    assert episode["ratio"][:3] == [100, 104, 105]  # exp(0.05 sin(0, 1, 2))
    assert episode["text"] == "an answer"  # without the model's tokenizer
    assert "no_signal" in page
    assert "rlora.rewards.integer:integer_answer" in page
    assert "0123456789abcdef" in page
    assert "the tokenizer of missing/model can" in page


def test_tokens_have_texts_if_the_tokenizer_is_there(tmp_path: Path, worded: str) -> None:
    page = page_of(write_run(tmp_path / "sums", model=worded))
    index, groups = chunk(page, "completions-0"), chunk(page, "completions-0-0")
    ids = groups[0]["episodes"][0]["ids"]
    tokens = report_run.step_groups(0)[0].episodes[0].completion_ids
    assert "".join(index["texts"][number] for number in ids).split() == [f"w{token}" for token in tokens]
    assert "tokenizer" not in page.split("<footer>")[0].split("</style>")[1]


def test_masks_and_long_completions(tmp_path: Path, worded: str) -> None:
    (group, *_) = report_run.step_groups(0)
    long = report_run.played(0, tokens=5000)
    agent = replace(report_run.played(0, tokens=4), sampled_mask=(True, False, True, True))
    groups = {0: [replace(group, episodes=(long, agent))]}
    page = page_of(write_run(tmp_path / "sums", steps=1, model=worded, groups=groups))
    first, second = chunk(page, "completions-0-0")[0]["episodes"]
    assert (len(first["ids"]), first["cut"], first["length"]) == (4000, 1000, 5000)
    assert (second["mask"], len(second["prob"])) == ([1, 0, 1, 1], 3)


HOSTILE = [
    "</script><script>window.hacked = 1</script>", "<img src=x onerror='window.hacked=1'>", "\u202egnp.exe",
    "\x00\x1b[31m\x07",
    "{{ 7 * 7 }}{% raw %}", "\ud800 half", "&lt;b&gt;", "مرحبا بالعالم", "x" * 3_000_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_texts_of_completions_are_data(tmp_path: Path, text: str) -> None:
    groups = {0: [report_run.with_text(report_run.step_groups(0)[0], text)]}
    run = write_run(tmp_path / "sums", steps=1, groups=groups)
    page = page_of(run)
    assert "window.hacked" not in page
    assert len(page) < 2**22
    shown = chunk(page, "completions-0-0")[0]
    expected = text if len(text) < 20_000 else f"{text[:20_000]}\n[2,980,000 more characters]"
    assert shown["prompt"] == [["user", expected]]
    assert shown["episodes"][0]["text"] == expected
    page.encode()  # it can be written


def test_texts_of_a_config_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>sums", steps=1)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("a machine", "<script>window.hacked = 1</script>"))
    page = page_of(run)
    assert "<script>window.hacked" not in page
    assert "&lt;script&gt;window.hacked" in page
    assert "<b>sums" not in page


def notes(page: str) -> str:
    return page.partition('<details class="notes"')[2].partition("</details>")[0]


def test_a_run_that_is_being_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sums", done=3)
    for name in ("metrics.jsonl", "weights.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 3, "rew')
    page = page_of(run)
    assert chunk(page, "data")["runs"][0]["columns"]["step"] == [0, 1, 2]
    assert "stopped" in page
    assert "3 of 6" in page


def test_a_run_without_any_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sums", done=1)
    for name in ("metrics.jsonl", "weights.jsonl", "summary.json", "matrices.json"):
        (run / name).unlink()
    shutil.rmtree(run / "bundles")
    page = page_of(run)
    assert chunk(page, "data")["charts"] == []
    assert chunk(page, "completions-0")["prompts"] == {}


def test_damaged_files_are_left_out_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sums")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(
        "\n".join([lines[0], "{damaged}", '["no object"}', '{"no": "step"}', lines[5]]) + "\n"
    )
    (run / "summary.json").write_text("{")
    (run / "matrices.json").write_text("[1]")
    episodes = run / "bundles" / "3" / "update.parquet"
    episodes.write_bytes(episodes.read_bytes()[:-1] + b"x")
    (run / "bundles" / "2" / "bundle.json").write_text("{}")
    shutil.rmtree(run / "bundles" / "4")
    page = page_of(run)
    said = notes(page)
    assert "metrics.jsonl: 3 damaged lines are left out" in said
    assert "summary.json is damaged" in said
    assert "matrices.json is damaged" in said
    assert "step 2: the completions can" in said
    assert "step 1: the completions can" in said
    assert sorted(chunk(page, "completions-0")["prompts"]) == ["0", "4", "5"]


def test_a_damaged_config_does_not_hide_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sums")
    (run / "config.toml").write_text("steps = [")
    assert "config.toml is damaged" in notes(page_of(run))


def test_a_bundle_of_a_newer_release_is_named(tmp_path: Path) -> None:
    from rlora.run.checkpoint import _canonical, _digest

    run = write_run(tmp_path / "sums", steps=2)
    path = run / "bundles" / "2" / "bundle.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["format"] = 99
    path.write_text(json.dumps({"sha256": _digest(_canonical(manifest))} | manifest))
    assert "format = 99; this release of rlora reads format 1" in notes(page_of(run))


def test_a_run_of_an_earlier_release_has_no_figures_of_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sums")
    (run / "weights.jsonl").unlink()
    (run / "matrices.json").unlink()
    assert chunk(page_of(run), "data")["runs"][0]["weights"] is None


def test_runs_that_share_no_step(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "early", steps=3), write_run(tmp_path / "late", steps=6, first=3))
    first, second = chunk(page, "data")["runs"]
    assert (first["columns"]["step"], second["columns"]["step"]) == ([0, 1, 2, 3], [3, 4, 5, 6])


def test_of_many_runs_the_page_says_what_it_leaves_out(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{number:02}", steps=2) for number in range(50)]
    page = page_of(*runs)
    assert len(chunk(page, "data")["runs"]) == MOST_RUNS == 20
    assert "30 of 50 runs are left out" in notes(page)
    assert "run-49" in notes(page)
    assert "heat maps and paths are of the first 6 runs" in notes(page)


def test_completions_beyond_the_limit_are_left_out_evenly(tmp_path: Path) -> None:
    run = read_data(write_run(tmp_path / "sums", steps=40))
    every = read_completions(run, LIMIT)
    size = sum(map(len, every.chunks.values()))
    found = read_completions(run, size // 4)
    assert 6 <= len(found.chunks) <= 10
    assert {0, 39} <= found.chunks.keys()
    gaps = [b - a for a, b in zip(sorted(found.chunks), sorted(found.chunks)[1:], strict=False)]
    assert max(gaps) <= 11
    assert f"completions of {len(found.chunks)} of 40 steps are shown" in found.notes[-1]
    assert "--episodes-mib" in found.notes[-1]
    assert not read_completions(run, 0).chunks


def test_bundles_that_were_removed_are_counted(tmp_path: Path) -> None:
    run = read_data(write_run(tmp_path / "sums", steps=10, keep_last=3, keep_best=0))
    found = read_completions(run, LIMIT)
    assert sorted(found.chunks) == [7, 8, 9]
    assert "3 of 10 steps have a bundle" in found.notes[-1]


def test_a_bundle_that_the_run_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_data(write_run(tmp_path / "sums", steps=3))
    monkeypatch.setattr("rlora.report.completions.checkpoint.versions", lambda _: [1, 2, 3, 4])
    found = read_completions(run, LIMIT)
    assert sorted(found.chunks) == [0, 1, 2]
    assert any(note.startswith("step 3: the completions can't be read") for note in found.notes)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64, 100])
def test_spread_yields_each_step_once(count: int) -> None:
    steps = list(range(5, 5 + count))
    found = list(spread(steps))
    assert sorted(found) == steps
    assert found[:2] == [steps[-1], steps[0]] if count > 1 else found == steps


def test_long_runs_have_a_heat_map_of_a_hundred_steps(tmp_path: Path) -> None:
    run = read_data(write_run(tmp_path / "sums", steps=2))
    lines = [report_run.weights_line(step, len(run.matrices)) for step in range(350)]
    (run.path / "weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    maps = heat_maps(read_data(run.path))
    assert maps
    assert (len(maps["steps"]), maps["steps"][0], maps["steps"][-1], maps["of"]) == (100, 0, 349, 350)
    assert all(len(row) == 100 for row in maps["figures"]["norm"])


def test_charts_without_their_metrics_are_left_out() -> None:
    titles = lambda **columns: [chart["title"] for chart in charts([columns])]  # noqa: E731
    assert titles() == []
    assert titles(**{"staleness": [0.0, 0.0]}) == []
    assert titles(**{"staleness": [0.0, 1.0]}) == ["Staleness"]
    (chart,) = charts([{"accuracy/held_out": [0.5], "accuracy/version": [1], "accuracy/held_out/low": [0.4]}])
    assert (chart["metrics"], chart["band"]) == (["accuracy/held_out"], None)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"it is not a run, because it has no config\.toml"):
        read_data(UPath(tmp_path))


def test_a_sweep_is_shown_with_its_ranking(tmp_path: Path, sweep_of: Callable[[Path], UPath]) -> None:
    out = tmp_path / "report.html"
    runs = write_report([sweep_of(tmp_path / "sweep")], out, LIMIT)
    assert [run.name for run in runs] == ["seed-0", "seed-1"]
    assert "Configurations by" in out.read_text()


@pytest.fixture
def sweep_of() -> Callable[[Path], UPath]:
    """Writes a finished sweep of two members."""

    def write(path: Path) -> UPath:
        for number in range(2):
            write_run(path / f"seed-{number}", shift=0.1 * number)
        config = (path / "seed-0" / "config.toml").read_text().partition("[provenance]")[0]
        (path / "config.toml.part").write_text(config)
        sweep = f"[over]\nseed = [0, 1]\n[members]\n[halving]\nat = []\nkeep = 0.5\n[config]\n{_nested(config)}"
        (path / "sweep.toml").write_text(sweep)
        events = [
            {"event": event, "member": f"seed-{number}"} for number in range(2) for event in ("began", "finished")
        ]
        (path / "sweep.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return UPath(path)

    return write


def _nested(config: str) -> str:
    return re.sub(r"^\[", "[config.", config, flags=re.MULTILINE)


def test_watching_follows_a_run_that_is_killed_and_resumed(tmp_path: Path) -> None:
    """Each state is a directory that replaces the one before, as a run that was killed leaves a partial line."""
    states = [write_run(tmp_path / f"state-{done}" / "sums", done=done) for done in (2, 4, 6)]
    run, out = UPath(tmp_path / "sums"), tmp_path / "report.html"
    shutil.copytree(states[0], run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # killed
    watching = Thread(target=watch, args=([run], out, LIMIT, 0.05), daemon=True)
    watching.start()

    def wait_for(text: str) -> str:
        for _ in range(600):
            if out.exists() and text in (page := out.read_text()):
                return page
            time.sleep(0.05)
        raise AssertionError(f"{text!r} did not appear")

    assert chunk(wait_for("2 of 6"), "data")["refresh"] == 0.05
    for done, state in zip((4, 6), states[1:], strict=True):
        for name in ("metrics.jsonl", "weights.jsonl", "summary.json"):
            (run / f"{name}.new").write_bytes((state / name).read_bytes())
            (run / f"{name}.new").rename(run / name)
        wait_for(f"{done} of 6")
    watching.join(timeout=30)
    assert not watching.is_alive()  # the run is finished
    assert chunk(out.read_text(), "data")["refresh"] is None
    assert chunk(out.read_text(), "data")["runs"][0]["columns"]["step"] == list(
        range(7)
    )  # with the accuracy after training


def test_logprobs_that_are_not_finite_have_no_colour(tmp_path: Path) -> None:
    group = report_run.step_groups(0)[0]
    broken = replace(group.episodes[0], behaviour_logprobs=(float("nan"), *group.episodes[0].behaviour_logprobs[1:]))
    groups = {0: [replace(group, episodes=(broken,))]}
    (episode,) = chunk(page_of(write_run(tmp_path / "sums", steps=1, groups=groups)), "completions-0-0")[0]["episodes"]
    assert (episode["prob"][0], episode["ratio"][0]) == (None, None)
    assert None not in episode["prob"][1:]


def test_given_completions_have_the_probabilities_of_the_learner(tmp_path: Path) -> None:
    group = report_run.step_groups(0)[0]
    given = replace(group.episodes[0], version=BASE.version, behaviour_logprobs=(0.0,) * 6, reward=None, parts={})
    run = write_run(tmp_path / "sums", steps=1, groups={0: [replace(group, episodes=(given,))]})
    (episode,) = chunk(page_of(run), "completions-0-0")[0]["episodes"]
    assert episode["version"] is None
    assert "ratio" not in episode
    assert episode["prob"][:3] == [100, 104, 105]  # exp of the logprobs of `trained_on`


def test_characters_of_several_tokens_and_spaces_are_kept(tmp_path: Path, demo: str) -> None:
    text = "The answer is 4. 你好世界 😀"
    ids = tuple(AutoTokenizer.from_pretrained(demo).encode(text))
    group = report_run.step_groups(0)[0]
    written = replace(group.episodes[0], completion_ids=ids, behaviour_logprobs=(-1.0,) * len(ids), text=text)
    run = write_run(tmp_path / "sums", steps=1, model=demo, groups={0: [replace(group, episodes=(written,))]})
    page = page_of(run)
    index, (shown,) = chunk(page, "completions-0"), chunk(page, "completions-0-0")[0]["episodes"]
    assert "".join(index["texts"][number] for number in shown["ids"]) == text


def test_an_evaluation_is_drawn_at_its_version(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sums", done=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[3] |= {"accuracy/held_out": 0.5, "accuracy/held_out/low": 0.4, "accuracy/version": 2}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = read_data(run).columns
    assert columns["accuracy/held_out"] == [None, None, 0.5, None]
    assert columns["accuracy/held_out/low"] == [None, None, 0.4, None]


def test_figures_of_another_kind_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sums")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"reward/mean": "high", "time/step": [1], "time/wait": {"a": 1}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = (run / "weights.jsonl").read_text().splitlines()
    others = [{"step": 0, "norm": 3}, {"step": 1, "norm": [1.0] * 12}]
    (run / "weights.jsonl").write_text("\n".join([*map(json.dumps, others), *weights[2:]]) + "\n")
    (run / "summary.json").write_text(json.dumps({"accuracy/after": "0.5", "time/total": [1]}))
    page = page_of(run)
    assert "weights.jsonl: 2 lines do not match matrices.json" in notes(page)
    assert chunk(page, "data")["runs"][0]["columns"]["reward/mean"][1] is None


def test_runs_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    sources = [write_run(tmp_path / name / "seed-0", steps=1) for name in ("a", "b")]
    runs = write_report(sources, tmp_path / "new" / "report.html", LIMIT)
    assert [run.name for run in runs] == ["a/seed-0", "b/seed-0"]
    with pytest.raises(RloraError, match="no run; name the directory of a run or a sweep"):
        write_report([], tmp_path / "report.html", LIMIT)


def test_arguments_that_look_like_secrets_are_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sums", steps=1)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("[env_args]", '[env_args]\napi_key = "s3cret"\nlow = 17'))
    page = page_of(run)
    assert "s3cret" not in page
    assert "env_args.low" in page
    assert "sampling.max_tokens" in page


@pytest.mark.parametrize("damage", ["summary.json", "sweep.toml"])
def test_a_damaged_sweep_is_shown_without_a_ranking(
    tmp_path: Path, sweep_of: Callable[[Path], UPath], damage: str
) -> None:
    sweep = sweep_of(tmp_path / "sweep")
    (sweep / damage if damage == "sweep.toml" else sweep / "seed-0" / damage).write_text("{")
    write_report([sweep], tmp_path / "report.html", LIMIT)
    assert "its configurations can" in (tmp_path / "report.html").read_text()


def test_watching_a_sweep_waits_for_members_that_have_not_begun(
    tmp_path: Path, sweep_of: Callable[[Path], UPath]
) -> None:
    sweep = sweep_of(tmp_path / "sweep")
    (sweep / "seed-1").rename(tmp_path / "seed-1")
    watching = Thread(target=watch, args=([sweep], tmp_path / "report.html", LIMIT, 0.05), daemon=True)
    watching.start()
    watching.join(timeout=3)
    assert watching.is_alive()
    (tmp_path / "seed-1").rename(sweep / "seed-1")
    with (sweep / "sweep.jsonl").open("a") as diary:  # a dropped member has ended
        diary.write(json.dumps({"event": "dropped", "member": "seed-1", "step": 6}) + "\n")
    watching.join(timeout=30)
    assert not watching.is_alive()
    assert 'class="status dropped"' in (tmp_path / "report.html").read_text()
