"""TRL + PEFT compared with rlora on given completions: seconds per update of SFT and DPO, in one run.

    .venv/bin/python benchmarks/supervised.py                   # examples made of words, 200 tokens on average
    .venv/bin/python benchmarks/supervised.py --path train.jsonl --prompt question --completion answer

Both sides train the same tokens of SmolLM2-135M in bf16 with a rank-1 adapter on every linear layer in fp32, in the
same batches, one process after the other on all cores. SFT takes `--examples` per update, DPO half as many pairs, whose
rejected completion is that of another example. TRL trains SFT with padding-free and with padded batches, and the ratio
is to the faster one; its DPO pads. The first update of each side is not counted. The last line printed is a JSON
object: tokens per second of each side, the ratio, and the share of the time that the matrix products of the update need
at the speed of a large bf16 product on this machine.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rlora.config import validate
from rlora.device import hardware
from rlora.model.base import load_base, load_tokenizer, locate
from rlora.records import BASE, Episode, Group, Prompt

DEMO = "demo:smollm2-135m"
ROOT = Path(__file__).resolve().parent.parent
KL = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="", help="jsonl file with prompts and completions")
    parser.add_argument("--prompt", default="prompt")
    parser.add_argument("--completion", default="completion")
    parser.add_argument("--examples", type=int, default=16, help="per update")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        work = json.loads(Path(options.work).read_text())
        print(json.dumps(SIDES[options.side](work)))
        return
    rows = tokenised(options)
    figures: dict[str, Any] = {"machine": hardware(), "matmul_tflops": peak()}
    for loss in ("sft", "dpo"):
        work = {"loss": loss, "updates": batches(rows, options, loss)}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(work, file)
            file.flush()
            sides = [side for side in SIDES if loss == "sft" or side != "trl_padded"]
            seconds = {side: measured(side, file.name) for side in sides}
        tokens = sum(len(prompt) + sum(map(len, sides)) for update in work["updates"][1:] for prompt, *sides in update)
        for side, times in seconds.items():
            figures[f"{loss}/{side}_tokens_per_second"] = round(tokens / sum(times[1:]))
        fastest = min(sum(times[1:]) for side, times in seconds.items() if side != "rlora")
        figures[f"{loss}/ratio"] = round(fastest / sum(seconds["rlora"][1:]), 2)
        needed = flops(work["updates"][1:], loss) / figures["matmul_tflops"] / 1e12
        figures[f"{loss}/matmul_share"] = round(needed / sum(seconds["rlora"][1:]), 2)
    print(json.dumps(figures))


def tokenised(options: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each example, as token ids."""
    tokenizer = load_tokenizer(locate(DEMO))
    count = options.examples * (options.updates + 1)
    if options.path:
        lines = [json.loads(line) for line in Path(options.path).read_text().splitlines()[:count]]
        pairs = [(str(line[options.prompt]), str(line[options.completion])) for line in lines]
    else:
        words, rng = "the of a number box holds seven apples and Mia buys more".split(), random.Random(0)
        pairs = [tuple(" ".join(rng.choices(words, k=k)) for k in (60, rng.randrange(80, 200))) for _ in range(count)]
    ended = [tokenizer.eos_token_id]
    rendered = [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                              return_dict=False) for text, _ in pairs]  # fmt: skip
    return [
        (list(prompt), tokenizer.encode(completion, add_special_tokens=False) + ended)
        for prompt, (_, completion) in zip(rendered, pairs, strict=True)
    ]


def batches(
    rows: Sequence[tuple[list[int], list[int]]], options: argparse.Namespace, loss: str
) -> list[list[list[list[int]]]]:
    """The examples of each update: prompt and completion, for DPO also the completion of another example."""
    size = options.examples if loss == "sft" else options.examples // 2
    updates = [rows[start : start + size] for start in range(0, size * (options.updates + 1), size)]
    if loss == "sft":
        return [[[prompt, completion] for prompt, completion in update] for update in updates]
    return [[[prompt, completion, update[n - 1][1]] for n, (prompt, completion) in enumerate(update)]
            for update in updates]  # fmt: skip


def measured(side: str, work: str) -> list[float]:
    """Seconds of each update of a side, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--work", work]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    times: list[float] = json.loads(output.splitlines()[-1])
    return times


def with_rlora(work: dict[str, Any]) -> list[float]:
    from rlora.core.learner import Learner
    from rlora.core.setup import Setup

    table = {"model": DEMO, "env": "rlora.envs.examples:Examples", "reward": "", "algorithm": {"name": work["loss"]}}
    if work["loss"] == "dpo":
        table["algorithm"] = {"name": "dpo", "kl": KL}
    config = validate(table | {"learner": {"rank": 1, "lr": 1e-5}})
    learner = Learner(config, locate(DEMO))
    learner.open("run", Setup.of(config, None))

    def update(examples: Sequence[Sequence[list[int]]]) -> None:
        learner.update("run", [group(*example) for example in examples])

    return timed(update, work["updates"])


def group(prompt: list[int], *completions: list[int]) -> Group:
    episodes = tuple(
        Episode(tuple(ids), (0.0,) * len(ids), "stop", BASE.version, reward=1.0 - number)
        for number, ids in enumerate(completions)
    )
    return Group(Prompt("", token_ids=tuple(prompt)), episodes)


def with_trl_padded(work: dict[str, Any]) -> list[float]:
    return with_trl(work, padding_free=False)


def with_trl(work: dict[str, Any], padding_free: bool = True) -> list[float]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    base = locate(DEMO)
    lora = LoraConfig(r=1, lora_alpha=32, target_modules="all-linear")
    model, tokenizer = load_base(base, torch.bfloat16), load_tokenizer(base)
    common: dict[str, Any] = {
        "use_cpu": True, "report_to": [], "bf16": True, "gradient_checkpointing": False, "learning_rate": 1e-5,
        "per_device_train_batch_size": len(work["updates"][0]), "max_length": None,
    }  # fmt: skip
    examples = [example for update in work["updates"] for example in update]
    with tempfile.TemporaryDirectory() as directory:
        if work["loss"] == "sft":
            rows = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in examples]
            arguments = SFTConfig(output_dir=directory, padding_free=padding_free, **common)
            trainer: Any = SFTTrainer(
                model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
            )
        else:
            dummy = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
            arguments = DPOConfig(output_dir=directory, beta=KL, **common)
            trainer = DPOTrainer(
                model, args=arguments, train_dataset=dummy, processing_class=tokenizer, peft_config=lora
            )
        optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-5)
        trainer.model.train()

        def update(examples: Sequence[Sequence[list[int]]]) -> None:
            if work["loss"] == "sft":
                made = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in examples]
            else:
                made = [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": b} for p, a, b in examples]
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(trainer.model, trainer.data_collator(made)).backward()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return timed(update, work["updates"])


def timed(update: Callable[[Any], None], updates: Sequence[Any]) -> list[float]:
    seconds = []
    for examples in updates:
        start = time.perf_counter()
        update(examples)
        seconds.append(time.perf_counter() - start)
    return seconds


def flops(updates: Sequence[Any], loss: str) -> float:
    """Multiplications and additions of the base's matrix products, each token once: forward and backward with respect
    to activations, for DPO also the reference policy's forward pass; the head for completion tokens."""
    config = read_config()
    layers = config["num_hidden_layers"] * config["hidden_size"] * (
        2 * config["hidden_size"] * (1 + config["num_key_value_heads"] / config["num_attention_heads"])
        + 3 * config["intermediate_size"]
    )  # fmt: skip
    head = config["hidden_size"] * config["vocab_size"]
    passes = 2 if loss == "sft" else 3
    tokens = sum(len(prompt) + sum(map(len, sides)) for update in updates for prompt, *sides in update)
    completion = sum(sum(map(len, sides)) for update in updates for _, *sides in update)
    return float(2 * passes * (layers * tokens + head * completion))


def read_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(locate(DEMO)) / "config.json").read_text())
    return config


def peak() -> float:
    """TFLOP/s of a large bf16 product."""
    a, b = torch.randn(2048, 1536, dtype=torch.bfloat16), torch.randn(1536, 2048, dtype=torch.bfloat16)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 2048 * 1536 * 2048 / median(seconds) / 1e12


SIDES = {"rlora": with_rlora, "trl": with_trl, "trl_padded": with_trl_padded}

if __name__ == "__main__":
    main()
