"""The TRL side of peers.py: trains with TRL + PEFT as described by a JSON file.

It runs in TRL's environment, `python peer_trl.py <work.json> <measured.json>`, and does not import rlora.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer


class Measure(TrainerCallback):
    """Scores TRL's samples, times its steps, and stops it once a step's mean reward reaches `target`.

    The clock starts with the first step, after imports and loading the model. The seconds of a step include sampling,
    rewards, forward and backward passes and the optimizer step.
    """

    __name__ = "reward"  # TRL logs a reward function under this name

    def __init__(self, work: dict[str, Any]) -> None:
        self.work = work
        self.reward = load(work["reward_file"], work["reward_name"])
        self.measured: dict[str, list[float]] = {"seconds": [], "rewards": [], "lengths": []}

    def __call__(
        self,
        prompts: list[list[dict[str, str]]],
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        answer: list[Any],
        **_: Any,
    ) -> list[float]:
        """Reward function with TRL's signature, called once per step; checks that the prompts are those of the step."""
        expected = self.work["steps"][len(self.measured["rewards"])]
        group_size = self.work["group_size"]
        assert [prompt[0]["content"] for prompt in prompts[::group_size]] == [row["text"] for row in expected]
        assert len(prompts) == group_size * len(expected)
        rewards = [self.reward(turns[0]["content"], gold) for turns, gold in zip(completions, answer, strict=True)]
        self.measured["rewards"].append(fmean(rewards))
        self.measured["lengths"].append(fmean(map(len, completion_ids)))
        return rewards

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.lapped = time.perf_counter()

    def on_step_end(self, _: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        now = time.perf_counter()
        self.measured["seconds"].append(now - self.lapped)
        self.lapped = now
        seconds, reward = self.measured["seconds"][-1], self.measured["rewards"][-1]
        print(f"step {state.global_step}/{state.max_steps}: reward {reward:.3f}, {seconds:.1f} s", flush=True)
        control.should_training_stop |= reward >= self.work["target"]


def load(file: str, name: str) -> Callable[[str, Any], float]:
    """The function `name` of a Python file."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[[str, Any], float] = getattr(module, name)
    return function


def dataset(work: dict[str, Any]) -> Dataset:
    """The prompts of all steps in order, as chat messages; their tokens are checked against rlora's."""
    tokenizer = AutoTokenizer.from_pretrained(work["base"])
    rows = []
    for prompt in (prompt for step in work["steps"] for prompt in step):
        messages = [{"role": "user", "content": prompt["text"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == prompt["token_ids"], f"other tokens than rlora's for {prompt['text']!r}"
        rows.append({"prompt": messages, "answer": prompt["answer"]})
    return Dataset.from_list(rows)


def config(work: dict[str, Any], output: Path) -> GRPOConfig:
    """rlora's settings as TRL's config."""
    completions = len(work["steps"][0]) * work["group_size"]
    return GRPOConfig(
        output_dir=str(output),
        max_steps=len(work["steps"]),
        shuffle_dataset=False,
        seed=work["seed"],
        # sampling
        num_generations=work["group_size"],
        max_completion_length=work["max_tokens"],
        temperature=work["temperature"],
        top_p=1.0,
        top_k=0,
        # one update with all completions: sum of token losses / number of completion tokens
        per_device_train_batch_size=work["rows"],
        gradient_accumulation_steps=completions // work["rows"],
        gradient_checkpointing=False,
        num_iterations=1,
        scale_rewards="none",
        loss_type="dapo",
        beta=0.0,
        # Adam
        optim="adamw_torch",
        learning_rate=work["lr"],
        lr_scheduler_type="constant",
        adam_beta1=work["betas"][0],
        adam_beta2=work["betas"][1],
        adam_epsilon=work["eps"],
        weight_decay=0.0,
        max_grad_norm=work["max_grad_norm"],
        # the machine
        model_init_kwargs={"dtype": torch.bfloat16, "attn_implementation": work["attention"]},
        bf16=work["autocast"],
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def main() -> None:
    """Train as described by `sys.argv[1]`, and write the measurements to `sys.argv[2]`."""
    source, target = map(Path, sys.argv[1:])
    work = json.loads(source.read_text())
    measure = Measure(work)
    trainer = GRPOTrainer(
        model=work["base"],
        reward_funcs=measure,
        args=config(work, target.with_suffix(".trl")),
        train_dataset=dataset(work),
        peft_config=LoraConfig(r=work["rank"], lora_alpha=work["alpha"], target_modules="all-linear"),
        callbacks=[measure],
    )
    trainer.train()
    target.write_text(json.dumps(measure.measured))


if __name__ == "__main__":
    main()
