"""A version of a run for others to load: an adapter, merged weights or all weights, with a model card."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import tomli_w
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from upath import UPath

from rlora import machine
from rlora.model.base import load_tokenizer, locate
from rlora.model.chat import Chat
from rlora.records import Adapter, RloraError
from rlora.run import directory
from rlora.run.checkpoint import Bundle
from rlora.run.merge import merge
from rlora.settings import ChatConfig, Config
from rlora.store import write_adapter, write_file
from rlora.telemetry.metrics import sparkline

TEMPLATE = "chat_template.jinja"  # as transformers names it


def export(run: UPath, bundle: Bundle, to: Path, merged: Literal["bfloat16", "float32"] | None = None) -> str:
    """Write a version of `run` to the directory `to`, with its model card; returns what was written, in a line.

    An adapter is written in PEFT's format; with `merged`, the base with the adapter in its weights, in that dtype, as
    transformers and vLLM load it. Raises RloraError where `to` is there, or where there is no adapter to merge.
    """
    if to.exists():
        raise RloraError(f"--to {to}: it is there already; name another directory")
    adapter, config = bundle.adapter, bundle.config
    if adapter.full_weights and merged:
        raise RloraError("--merge: this run trained all weights, so there is no adapter to merge; leave it out")
    what = f"version {adapter.number}"
    if merged:
        off = _write_merged(config, adapter, to, merged)
        said = f"{what} merged in {merged}: {to}; the merged update is {off:.2%} off the adapter's"
        if off > 0.01:
            said += f". Rounding to {merged} loses that part: export with --dtype float32, or serve the adapter itself"
    elif adapter.full_weights:
        _write_all_weights(config, adapter, to)
        said = f"{what}, all weights: {to}"
    else:
        base = json.loads(adapter.config)["base_model_name_or_path"]
        template = _tokenizer(config).chat_template if config.chat.template else None  # else the base brings its own
        said = f"{what}: {write_adapter(adapter, to)}, over the base {base}"
        if template:
            write_file(to / TEMPLATE, str(template).encode())
    write_file(to / "README.md", card(run, bundle, merged).encode())
    return said


def _write_merged(config: Config, adapter: Adapter, to: Path, dtype: str) -> float:
    """Returns `merge`'s share of the update that rounding took."""
    tokenizer = _tokenizer(config)
    base = AutoModelForCausalLM.from_pretrained(locate(config.model), dtype=torch.float32)
    off = merge(base, adapter, machine.DTYPES[dtype])
    base.save_pretrained(to)
    tokenizer.save_pretrained(to)
    for weights in to.glob("*.safetensors"):  # safetensors lets only their owner read them
        weights.chmod((to / "config.json").stat().st_mode)
    return off


def _write_all_weights(config: Config, version: Adapter, to: Path) -> None:
    tokenizer = _tokenizer(config)
    write_adapter(version, to)
    tokenizer.save_pretrained(to)
    with suppress(OSError):  # it has none
        GenerationConfig.from_pretrained(locate(config.model)).save_pretrained(to)


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the chat template that was trained with."""
    tokenizer = load_tokenizer(locate(config.model))
    tokenizer.chat_template = Chat(tokenizer, config.chat, ()).template
    return tokenizer


def card(run: UPath, bundle: Bundle, merged: str | None = None) -> str:
    """The model card of a version: its base, config, data and curve, with the metadata that model hubs read.

    `merged` is the dtype of the weights that it was merged into; without one it is of the adapter.
    """
    config = bundle.config
    before = [line for line in directory.figures(run) if line["step"] < bundle.version]
    curve = [line["reward/mean"] or 0.0 for line in before]
    shown = before[:: max(1, len(before) // 10)]
    tags = ["lora", "reinforcement-learning", "rlora", config.algorithm.name]
    library = "transformers" if merged or config.learner.full_finetuning else "peft"
    head = {"base_model": config.model, "library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    return "\n".join([
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),  # JSON is YAML
        "---",
        f"# {run.name}, version {bundle.version}",
        "",
        f"`{config.model}` after reinforcement learning with a low-rank policy, by rlora.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(run, bundle, merged).items()),
        "",
        "## Prompts",
        "",
        *_prompts(config, merged),
        "",
        "## Mean reward by version",
        "",
        *(["```", sparkline(curve, width=len(curve)), "```", ""] if curve else []),
        "| version | mean reward | completion tokens |",
        "|---|---|---|",
        *(f"| {line['step']} | {line['reward/mean'] or 0.0:.3f} | {line['completion/length']:.1f} |" for line in shown),
        "",
        "## Config",
        "",
        "```toml",
        tomli_w.dumps(asdict(config)).strip(),
        "```",
        "",
    ])  # fmt: skip


def _prompts(config: Config, merged: str | None) -> list[str]:
    """How prompts were put to the policy, so that whoever serves it can do the same."""
    chat, usual = asdict(config.chat), asdict(ChatConfig())
    own = {name: value for name, value in chat.items() if value != usual[name] and name != "template"}
    if merged or config.learner.full_finetuning:
        lines = ["The chat template of its tokenizer, if it has one, is the one that it was trained with."]
    elif config.chat.template:
        lines = [
            f"It was trained with the chat template in `{TEMPLATE}`, not with the one of the base's tokenizer: give "
            f"`--chat-template {TEMPLATE}` to `vllm serve`, or set `tokenizer.chat_template` to its text."
        ]
    else:
        lines = ["It was trained with the chat template of the base's tokenizer, if that has one."]
    if own:
        lines += [
            "These settings of its prompts are in no template: a system message (`system`), what each answer begins "
            "with (`prefill`), strings that end it (`stop`), arguments of the template (`template_args`).",
            "",
            "```toml",
            tomli_w.dumps({"chat": own}).strip(),
            "```",
        ]
    return lines


def _facts(run: UPath, bundle: Bundle, merged: str | None) -> dict[str, str]:
    config, adapter, learner, summary = bundle.config, bundle.adapter, bundle.config.learner, directory.summary(run)
    kind = f"rank-{learner.rank} LoRA adapter (alpha {learner.alpha:g}, {learner.targets})"
    what = "model, all weights" if learner.full_finetuning else kind
    facts = {
        "base": f"`{config.model}`",
        "what it is": f"{what}, {adapter.parameters:,} parameters" + (f", merged in {merged}" if merged else ""),
        "algorithm": config.algorithm.name,
        "data": f"`{config.env}` {json.dumps(config.env_args)}",
        "reward": ", ".join(f"`{reward}`" for reward in config.rewards),
        "trained": f"{bundle.version} steps of {config.prompts_per_step} prompts x {config.group_size} completions, "
        f"learning rate {learner.lr}, seed {config.seed}",
        "made with": ", ".join(f"{name} {version}" for name, version in bundle.origin.packages.items()),
        "SHA-256": f"`{adapter.digest}`",
    }
    if fork := bundle.origin.forked_from:
        facts["forked from"] = f"`{fork['run']}@{fork['version']}` (`{fork['digest'][:12]}`)"
    if summary.get("steps") == bundle.version and "accuracy/after" in summary:
        before = f"{summary['accuracy/before']:.3f} before, " if "accuracy/before" in summary else ""
        facts["accuracy"] = (
            f"{before}{summary['accuracy/after']:.3f} after, greedily on {summary['accuracy/prompts']} held-out prompts"
        )
    return facts
