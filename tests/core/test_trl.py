"""Losses of given completions beside TRL's own trainers: the same rows, the same adapter, in fp32."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Solo, episode, group, save_words
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlora.records import Group
from rlora.settings import Config
from rlora.store import write_adapter

MakeConfig = Callable[..., Config]
KL, PREFIX = 0.2, "base_model.model."
PAIRS = [  # completions of several lengths, two pairs that share a prompt, one cut off before its end token
    group([5, 6], episode([7, 8, 9, 1], 1.0), episode([7, 10, 1], 0.0)),
    group([11, 3, 4, 5, 8], episode([12, 1], 1.0), episode([13, 14, 15, 16, 17, 18], 0.0)),
    group([5, 6], episode([20, 21, 1], 1.0), episode([22, 1], 0.0)),
]
TURNS = replace(episode([7, 8, 1, 30, 31, 32, 9, 1], 1.0), sampled_mask=(True,) * 3 + (False,) * 3 + (True,) * 2)
EXAMPLES = [group([5, 6], TURNS), *(group([*pair.prompt.token_ids], pair.episodes[0]) for pair in PAIRS)]


def rows(groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """A padded batch in TRL's form: the chosen completions, then the rejected ones."""
    pairs = [(each.prompt.token_ids, e) for number in range(len(groups[0].episodes)) for each in groups
             for e in each.episodes[number : number + 1]]  # fmt: skip
    longest = max(len(prompt) + len(e.completion_ids) for prompt, e in pairs)
    ids, attention, mask = torch.zeros(3, len(pairs), longest, dtype=torch.long)
    for row, (prompt, e) in enumerate(pairs):
        size = len(prompt) + len(e.completion_ids)
        ids[row, :size] = torch.tensor(prompt + e.completion_ids)
        attention[row, :size] = 1
        mask[row, len(prompt) : size] = torch.tensor(e.sampled_mask or (True,) * len(e.completion_ids)).long()
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": mask}


def trainer(name: str, model: PeftModel, tokenizer: Any, directory: Path) -> Any:
    """TRL's trainer with the settings of rlora's `name`."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    common: dict[str, Any] = {
        "output_dir": str(directory), "use_cpu": True, "report_to": [], "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    if name == "sft":
        data = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
        return SFTTrainer(model, SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
    data = Dataset.from_list([{"prompt": "w5", "chosen": "w6", "rejected": "w7"}])
    loss_type = {"dpo": "sigmoid", "ipo": "ipo"}[name]
    settings = DPOConfig(**common, beta=KL, loss_type=[loss_type])
    return DPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("name", ["sft", "dpo", "ipo"])
def test_losses_and_gradients_are_those_of_trl(name: str, config: MakeConfig, tiny: str, tmp_path: Path) -> None:
    groups = EXAMPLES if name == "sft" else PAIRS
    settings = {"model": tiny, "reward": "", "algorithm": {"name": name} | ({} if name == "sft" else {"kl": KL})}
    learning: dict[str, Any] = {"rank": 2, "lr": 0.05, "max_grad_norm": 1e9}
    first = Solo(config(**settings, learner=learning), tiny)
    path = write_adapter(first.update(groups)[0], tmp_path / "1")

    learner = Solo(config(**settings, learner=learning | {"start_from": str(path)}), tiny)
    _, stats = learner.update(groups)
    moments = learner.held.optimizer.adam.state

    save_words(str(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    lora = LoraConfig.from_pretrained(str(path))
    lora.inference_mode = False
    model = get_peft_model(base, lora)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    theirs = trainer(name, model, AutoTokenizer.from_pretrained(tmp_path), tmp_path / "trl")
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    inputs = rows(groups)
    if name == "sft":
        mask = inputs.pop("completion_mask")
        inputs["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
    model.train()
    loss = theirs.compute_loss(model, inputs)
    loss.backward()

    assert stats.loss == pytest.approx(loss.item(), abs=1e-5)
    pairs = [
        (moments[factor]["exp_avg"] / 0.1, model.get_parameter(f"{PREFIX}{matrix.key}.lora_{letter}.default.weight"))
        for matrix, factors in learner.bank.factors.items()
        if learner.name in factors.pairs
        for letter, factor in (("A", factors.pairs[learner.name].a), ("B", factors.pairs[learner.name].b))
    ]
    largest = max(float(parameter.grad.abs().max()) for _, parameter in pairs)
    assert largest > 1e-3
    for gradient, parameter in pairs:
        assert (gradient - parameter.grad).abs().max() < 3e-6 * largest  # fp32 is 1 to 4e-6 away from fp64 here
