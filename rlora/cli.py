"""The command line: rlora train | eval | grade | show | scale | export."""

import json
import sys
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

import rlora
from rlora.config import Config, ScoringConfig, validate
from rlora.options import Eval, Export, Grade, Scale, Show, Train, parse_eval, parse_show, parse_train, read_run
from rlora.records import BASE, STATUSES, Adapter, Case, RewardError, RloraError, Score

# torch, transformers and Ray take seconds to import: that waits until the command line is understood

_USAGE = f"""usage: rlora COMMAND ...

  train     {Train.__doc__}
  eval      {Eval.__doc__}
  grade     {Grade.__doc__}
  show      {Show.__doc__}
  scale     {Scale.__doc__}
  export    {Export.__doc__}

`rlora COMMAND --help` documents every option, `rlora --version` prints the version."""


def main() -> None:
    """Run the command in sys.argv; exits with 0, 1 (an error that its message explains), 2 (usage) or 130 (Ctrl-C)."""
    commands = {"train": _train, "eval": _eval, "grade": _grade, "show": _show, "scale": _scale, "export": _export}
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command in ("-h", "--help", "--version"):
        print(f"rlora {rlora.__version__}" if command == "--version" else _USAGE)
        sys.exit(0)
    if command not in commands:
        print(_USAGE, file=sys.stderr)
        sys.exit(2)
    try:
        commands[command](arguments)
    except (RloraError, OSError) as error:
        print(f"rlora: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("rlora: interrupted", file=sys.stderr)
        sys.exit(130)


def _train(arguments: list[str]) -> None:
    given = parse_train(arguments)
    from transformers import AutoConfig

    from rlora import checkpoint
    from rlora.learner import first_adapter
    from rlora.optimizer import auto_lr
    from rlora.task import load_task

    config = checkpoint.with_own_start(given.resume, given.config) if given.resume else given.config
    task = load_task(config)
    first_adapter(config.learner)  # it is only looked at here: the learner's process reads it
    if config.learner.lr == "auto":
        base = AutoConfig.from_pretrained(task.base)
        print(f"learner.lr = auto: {auto_lr(config, base):.2g}, by a rule that was fitted on supervised runs, of the "
              f"base's kind ({base.model_type}) and hidden size ({base.get_text_config().hidden_size})")  # fmt: skip
    from rlora.train import train

    if given.resume:
        run = given.resume
        if (checkpoint.last_version(run) or 0) >= config.steps:
            raise RloraError(f"steps = {config.steps}: {run} has them all; give more by --steps")
        checkpoint.write_config(run, given.config)
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run = given.run_dir or Path("runs") / f"{config.env.rpartition(':')[2].lower()}-{stamp}"
        checkpoint.create(run, config, task, given.overwrite)
    if task.dropped:
        print(f"{task.dropped} prompts are longer than sampling.max_prompt_tokens and left out")
    print(f"run: {run}")
    try:
        train(config, task, run)
    except BaseException:
        if (version := checkpoint.last_version(run)) is not None:
            print(f"The last whole adapter is {checkpoint.adapter_path(run, version)}; "
                  f"go on from it with `rlora train --resume {run}`", file=sys.stderr)  # fmt: skip
        raise
    _report(run, task.base, config.learner.whole)


def _report(run: Path, base: str, whole: bool) -> None:
    """The table at the end of a run, and what to do next."""
    from rich.console import Console
    from rich.table import Column, Table

    from rlora import checkpoint

    summary = checkpoint.summarise(run, {})
    table = Table("", Column("", overflow="fold"), title="What it gained", show_header=False)
    if "accuracy/after" in summary:
        table.add_row("held-out prompts, answered greedily", str(summary["accuracy/prompts"]))
        table.add_row("accuracy before", f"{summary['accuracy/before']:.3f}")
        table.add_row("accuracy after", f"{summary['accuracy/after']:.3f}")
    table.add_row("steps", str(summary["steps"]))
    table.add_row("wall time", f"{summary['time/total']:.0f} s, of which training {summary['time/train']:.0f} s")
    table.add_row(
        "all weights" if whole else "adapter",
        f"{summary['adapter/parameters']:,} parameters, {summary['adapter/bytes']:,} bytes",
    )
    table.add_row("where it lies", summary["adapter/path"])
    Console().print(table)
    print(f"Evaluate it again, or go on to N steps in all:\n  rlora eval {run}\n  rlora train --resume {run} --steps N")
    if whole:
        print(f"Load it:\n  policy = AutoModelForCausalLM.from_pretrained({summary['adapter/path']!r})")
        return
    print(f"Load it with PEFT:\n  base = AutoModelForCausalLM.from_pretrained({base!r})")
    print(f"  policy = PeftModel.from_pretrained(base, {summary['adapter/path']!r})")


def _scale(arguments: list[str]) -> None:
    given = tyro.cli(Scale, args=arguments, prog="rlora scale")
    most = read_run(given.run).engine.max_replicas
    if not 1 <= given.engines <= most:
        raise RloraError(f"engines = {given.engines}: the run's engine.max_replicas lets it have 1 to {most}")
    from rlora import checkpoint

    checkpoint.ask_for_engines(given.run, given.engines)
    print(f"{given.run}: {given.engines} engines from its next step on")


def _eval(arguments: list[str]) -> None:
    given = parse_eval(arguments)
    config = given.config
    if given.prompts is not None:
        config = validate(replace(config, evaluate=replace(config.evaluate, prompts=given.prompts)))
    if given.samples < 1:
        raise RloraError(f"--samples {given.samples}: give 1 or more")
    adapter, name, out = _adapter_to_evaluate(given)
    if given.adapter:  # of any rank
        config = replace(config, learner=replace(config.learner, start_from=str(given.adapter)))
    from rlora import cluster
    from rlora.evaluate import answer, pass_at, rows, summarise
    from rlora.rollout import sampling_of
    from rlora.task import load_task

    task = load_task(config)
    if not task.held_out:
        raise RloraError(
            f"env = {config.env!r}: none of its first evaluate.prompts = {config.evaluate.prompts} held-out prompts "
            "can be used; give --prompts where that is 0, or let held_out() return some"
        )
    greedy = given.samples == 1 and given.temperature is None
    sampling = sampling_of(config, given.samples, 0.0 if greedy else given.temperature)
    with cluster.start(config, task, name, learn=False) as (_, fleet, loop):
        fleet.swap(adapter)
        try:
            groups = answer(config, task.held_out, sampling, fleet, loop)
        except RewardError as error:
            write_rows(out, rows(error.groups))
            raise RloraError(f"{error}\nThe completions are kept in {out}") from error
    write_rows(out, rows(groups))
    result = summarise(groups)
    each = "greedy" if greedy else f"{given.samples} at temperature {sampling.temperature:g}"
    print(f"{name}: {len(groups)} held-out prompts, completions a prompt: {each}")
    for k in sorted({min(2**power, given.samples) for power in range(given.samples.bit_length() + 1)}):
        print(f"  pass@{k}  {pass_at(k, groups)}")
    print(f"  mean reward {result.reward:.3f}; {', '.join(f'{n} {status}' for status, n in result.statuses.items())}")
    print(f"  each completion with its verdict: {out}")


def _adapter_to_evaluate(given: Eval) -> tuple[Adapter, str, Path]:
    """The adapter that is asked for, what it is called, and where its completions go."""
    from rlora import checkpoint, peft_format

    is_run = given.source.suffix != ".toml"
    if given.adapter or given.base or not is_run:
        if given.version is not None or (given.adapter and given.base):
            raise RloraError("--version, --adapter and --base: each names what to evaluate; give one of them")
        adapter = Adapter("given", 0, *peft_format.read(given.adapter)) if given.adapter else BASE
        return adapter, str(given.adapter or "base"), given.out or Path("eval.jsonl")
    adapter = checkpoint.read_adapter(given.source, given.version)
    out = given.out or given.source / f"eval-{adapter.version}.jsonl"
    return adapter, f"{given.source.name} version {adapter.version}", out


def _grade(arguments: list[str]) -> None:
    given = tyro.cli(Grade, args=arguments, prog="rlora grade")
    from rlora.rewards.isolation import Pool
    from rlora.rewards.worker import Setup

    for field in ("deadline", "workers"):
        if getattr(given, field) <= 0:
            raise RloraError(f"--{field} {getattr(given, field):g}: give more than 0")
    table = _read_rows(given.file)
    setup = Setup((given.reward,), given.style, directory=str(Path.cwd()), deadline=given.deadline)
    start = time.perf_counter()
    with closing(Pool(setup, given.workers)) as pool:
        scores = [pool.do(_case_of(row)) for row in table]
        graded = [row | _verdict(score.result()[0][0]) for row, score in zip(table, scores, strict=True)]
    write_rows(given.out, graded)
    seconds = time.perf_counter() - start
    counts = {status: sum(row["status"] == status for row in graded) for status in STATUSES}
    print(f"{len(graded)} rows in {seconds:.1f} s: {', '.join(f'{n} {status}' for status, n in counts.items() if n)}")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows to grade. Raises RloraError that names the line where one has no gold or no prediction."""
    table = []
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RloraError(f"{path}, line {number}: not JSON ({error}); give an object a line") from None
        if not isinstance(row, dict) or "gold" not in row or not isinstance(row.get("prediction"), str):
            raise RloraError(
                f'{path}, line {number}: each row needs "gold", and "prediction", a string; this one is {line[:200]}'
            )
        table.append(row)
    return table


def _case_of(row: dict[str, Any]) -> Case:
    said = ({"role": "assistant", "content": row["prediction"]},)
    columns = {name: value for name, value in row.items() if name not in ("gold", "prediction")}
    return Case("", "", row["gold"], columns, (row["prediction"],), (said,), ((),), ({},))


def _verdict(score: Score) -> dict[str, Any]:
    """What a row gets. A number that has no status is its own verdict: correct from 1 on."""
    usual = ScoringConfig()
    status = score.status or ("correct" if (score.value or 0.0) >= usual.correct else "wrong")
    reward = score.value if score.value is not None else getattr(usual, status)
    return {"status": status, "reward": reward} | ({"detail": score.detail} if score.detail else {})


def write_rows(path: Path, table: Iterable[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    from rlora.checkpoint import write_file

    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row, default=str) + "\n" for row in table).encode())


def _show(arguments: list[str]) -> None:
    given = parse_show(arguments)
    from rlora.task import load_task

    task = load_task(given.config)
    if not 0 <= given.number < len(task.prompts):
        raise RloraError(f"--number {given.number}: there are {len(task.prompts)} training prompts, from 0")
    prompt = task.prompts[given.number]
    ends = [task.chat.shown([token]) for token in task.chat.stop_token_ids] + list(task.stop)
    print(f"{task.chat.shown(prompt.token_ids)}\n--- {len(prompt.token_ids)} tokens; answer {prompt.answer!r}; "
          f"the policy's message ends with {' or '.join(map(repr, ends))}")  # fmt: skip
    if prompt.columns:
        print(f"--- columns {dict(prompt.columns)!r}")


def _export(arguments: list[str]) -> None:
    given = tyro.cli(Export, args=arguments, prog="rlora export")
    config = read_run(given.run)
    if given.dtype and not given.merge:
        raise RloraError(f"--dtype {given.dtype}: it is of merged weights; add --merge, or leave it out")
    from rlora import checkpoint

    adapter = checkpoint.read_adapter(given.run, given.version)
    if given.to.exists():
        raise RloraError(f"--to {given.to}: it is there already; name another directory")
    if adapter.whole:
        _export_all_weights(config, adapter, given)
        return
    if not given.merge:
        base = json.loads(adapter.config)["base_model_name_or_path"]
        print(f"version {adapter.version}: {checkpoint.write_adapter(adapter, given.to)}, over the base {base}")
        return
    import torch
    from transformers import AutoModelForCausalLM

    from rlora import machine
    from rlora.base import load_tokenizer, locate
    from rlora.merge import merge

    where = locate(config.model)
    base = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    dtype = given.dtype or "bfloat16"
    off = merge(base, adapter, machine.DTYPES[dtype])
    base.save_pretrained(given.to)
    load_tokenizer(where).save_pretrained(given.to)
    print(f"version {adapter.version} merged in {dtype}: {given.to}; its update is {off:.2%} off the adapter's own")


def _export_all_weights(config: Config, version: Adapter, given: Export) -> None:
    """A directory that transformers and vLLM load as a model."""
    from transformers import GenerationConfig

    from rlora import checkpoint
    from rlora.base import load_tokenizer, locate

    if given.merge:
        raise RloraError("--merge: this run trained all weights, so there is no adapter to merge; leave it out")
    checkpoint.write_adapter(version, given.to)
    where = locate(config.model)
    load_tokenizer(where).save_pretrained(given.to)
    with suppress(OSError):  # it has none
        GenerationConfig.from_pretrained(where).save_pretrained(given.to)
    print(f"version {version.version}, all weights: {given.to}")
