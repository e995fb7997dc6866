"""Export of a version for other software: an adapter, merged weights or all weights, with a model card."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import tomli_w
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from upath import UPath

from rlora.device import DTYPES
from rlora.model.base import load_tokenizer, locate
from rlora.model.chat import Chat
from rlora.records import Adapter, RloraError
from rlora.run import directory
from rlora.run.checkpoint import Bundle
from rlora.run.merge import merge
from rlora.settings import ChatConfig, Config
from rlora.store import write_adapter, write_file
from rlora.telemetry.metrics import progress, sparkline

TEMPLATE = "chat_template.jinja"  # the name that transformers uses


def export(run: UPath, bundle: Bundle, target: Path, merged: Literal["bfloat16", "float32"] | None = None) -> str:
    """Write the version in `bundle` and a model card to the new directory `target`. Returns a one-line report.

    By default writes the adapter in PEFT's format, or all weights in transformers' format if the run trained these.
    With `merged`, merges the adapter into the base, and writes all weights in this dtype in transformers' format.
    Raises RloraError if `target` exists, or if there is no adapter to merge.
    """
    if target.exists():
        raise RloraError(f"--to {target}: it exists already; use a different directory")
    adapter, config = bundle.adapter, bundle.config
    if adapter.full_weights and merged:
        raise RloraError("--merge: this run trained all weights, so there is no adapter to merge; remove --merge")
    version = f"version {adapter.number}"
    if merged:
        error = _write_merged(config, adapter, target, merged)
        text = f"{version} merged in {merged}: {target}; the merged update is {error:.2%} off the adapter's"
        if error > 0.01:
            text += f". Rounding to {merged} loses that part: export with --dtype float32, or serve the adapter itself"
    elif adapter.full_weights:
        _write_all_weights(config, adapter, target)
        text = f"{version}, all weights: {target}"
    else:
        base = json.loads(adapter.config)["base_model_name_or_path"]
        template = _tokenizer(config).chat_template if config.chat.template else None  # otherwise the base's applies
        text = f"{version}: {write_adapter(adapter, target)}, for the base {base}"
        if template:
            write_file(target / TEMPLATE, str(template).encode())
    write_file(target / "README.md", card(run, bundle, merged).encode())
    return text


def _write_merged(config: Config, adapter: Adapter, target: Path, dtype: str) -> float:
    """Write the merged model to `target`. Returns the relative error of the merged update, see `merge`."""
    tokenizer = _tokenizer(config)
    base = AutoModelForCausalLM.from_pretrained(locate(config.model), dtype=torch.float32)
    error = merge(base, adapter, DTYPES[dtype])
    base.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for weights in target.glob("*.safetensors"):  # safetensors makes these files readable by their owner only
        weights.chmod((target / "config.json").stat().st_mode)
    return error


def _write_all_weights(config: Config, version: Adapter, target: Path) -> None:
    tokenizer = _tokenizer(config)
    write_adapter(version, target)
    tokenizer.save_pretrained(target)
    with suppress(OSError):  # the base has no generation_config.json
        GenerationConfig.from_pretrained(locate(config.model)).save_pretrained(target)


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, with the chat template that training used."""
    tokenizer = load_tokenizer(locate(config.model))
    tokenizer.chat_template = Chat(tokenizer, config.chat, ()).template
    return tokenizer


def card(run: UPath, bundle: Bundle, merged: str | None = None) -> str:
    """Return the model card of the version in `bundle`: base, config, data and learning curve, as Markdown with the
    metadata that model hubs read.

    `merged` is the dtype of merged weights; None if the adapter is not merged.
    """
    config = bundle.config
    lines = [line for line in directory.figures(run) if line["step"] < bundle.version]
    curve = [progress(line) or 0.0 for line in lines]
    shown = lines[:: max(1, len(lines) // 10)]
    training, figure = "reinforcement learning", "reward"
    if config.algorithm.supervised:
        is_sft = config.algorithm.loss == "sft"
        training = "supervised fine-tuning" if is_sft else "preference learning"
        figure = "log p per token" if is_sft else "accuracy"
    tags = ["lora", training.replace(" ", "-"), "rlora", config.algorithm.name]
    library = "transformers" if merged or config.learner.full_finetuning else "peft"
    head = {"base_model": config.model, "library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    return "\n".join([
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),  # JSON is YAML
        "---",
        f"# {run.name}, version {bundle.version}",
        "",
        f"`{config.model}` after {training} with a low-rank policy, by rlora.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(run, bundle, merged).items()),
        "",
        "## Prompts",
        "",
        *_prompts(config, merged),
        "",
        f"## Mean {figure} by version",
        "",
        *(["```", sparkline(curve, width=len(curve)), "```", ""] if curve else []),
        f"| version | mean {figure} | completion tokens |",
        "|---|---|---|",
        *(f"| {line['step']} | {progress(line) or 0.0:.3f} | {line['completion/length']:.1f} |" for line in shown),
        "",
        "## Config",
        "",
        "```toml",
        tomli_w.dumps(asdict(config)).strip(),
        "```",
        "",
    ])  # fmt: skip


def _prompts(config: Config, merged: str | None) -> list[str]:
    """Return Markdown lines on how training formatted prompts, so that a server can use the same format."""
    chat, defaults = asdict(config.chat), asdict(ChatConfig())
    changed = {name: value for name, value in chat.items() if value != defaults[name] and name != "template"}
    if merged or config.learner.full_finetuning:
        lines = ["Training used the chat template of this tokenizer, if it has one."]
    elif config.chat.template:
        lines = [
            f"Training used the chat template in `{TEMPLATE}` instead of the base tokenizer's: pass "
            f"`--chat-template {TEMPLATE}` to `vllm serve`, or set `tokenizer.chat_template` to its text."
        ]
    else:
        lines = ["Training used the chat template of the base's tokenizer, if it has one."]
    if changed:
        lines += [
            "The template does not contain these settings: the system message (`system`), the beginning of each answer "
            "(`prefill`), the strings that end it (`stop`), and the arguments of the template (`template_args`).",
            "",
            "```toml",
            tomli_w.dumps({"chat": changed}).strip(),
            "```",
        ]
    return lines


def _facts(run: UPath, bundle: Bundle, merged: str | None) -> dict[str, str]:
    config, adapter, learner, summary = bundle.config, bundle.adapter, bundle.config.learner, directory.summary(run)
    kind = f"rank-{learner.rank} LoRA adapter (alpha {learner.alpha:g}, {learner.targets})"
    form = "model, all weights" if learner.full_finetuning else kind
    facts = {
        "base": f"`{config.model}`",
        "type": f"{form}, {adapter.parameters:,} parameters" + (f", merged in {merged}" if merged else ""),
        "algorithm": config.algorithm.name,
        "data": f"`{config.env}` {json.dumps(config.env_args)}",
        "reward": ", ".join(f"`{reward}`" for reward in config.rewards) or "none",
        "trained": f"{bundle.version} steps of {config.prompts_per_step} prompts x {config.completions_per_prompt} "
        f"completions, learning rate {learner.lr}, seed {config.seed}",
        "software": ", ".join(f"{name} {version}" for name, version in bundle.origin.packages.items()),
        "SHA-256": f"`{adapter.digest}`",
    }
    for verb, source in (("forked", bundle.origin.forked_from), ("started", bundle.origin.started_from)):
        if source:
            facts[f"{verb} from"] = f"`{source['run']}@{source['version']}` (`{source['digest'][:12]}`)"
    if summary.get("steps") == bundle.version and "accuracy/after" in summary:
        initial = f"{summary['accuracy/before']:.3f} before, " if "accuracy/before" in summary else ""
        final, prompts = summary["accuracy/after"], summary["accuracy/prompts"]
        facts["accuracy"] = f"{initial}{final:.3f} after, greedily on {prompts} held-out prompts"
    for name in ("held_out/nll", "held_out/accuracy"):
        if summary.get("steps") == bundle.version and f"{name}/after" in summary:
            initial = f"{summary[f'{name}/before']:.4f} before, " if f"{name}/before" in summary else ""
            facts[name] = f"{initial}{summary[f'{name}/after']:.4f} after, on held-out examples"
    return facts
