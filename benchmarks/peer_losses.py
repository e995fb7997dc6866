"""TRL's part of losses.py: what `GRPOTrainer._compute_loss` makes of given logprobs.

It runs in TRL's own environment, `python peer_losses.py <work.json> <measured.json>`, and imports nothing of rlora.
The trainer is a stand-in that has the settings and hands out the logprobs; the loss is TRL's code.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from trl import GRPOTrainer


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    measured = {name: of_case(work, settings) for name, settings in work["cases"].items()}
    Path(sys.argv[2]).write_text(json.dumps(measured))


def of_case(work: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    lengths = torch.tensor([len(of) for of in work["now"]])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).double()
    now, start, behaviour, reference = (padded(work[name]) for name in ("now", "start", "behaviour", "reference"))
    now.requires_grad_()
    rewards = torch.tensor(work["rewards"]).double()  # (prompts, G)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if settings.get("scale_rewards", True):
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    kept = mask
    if settings.get("mask_truncated"):
        kept = mask * ~torch.tensor(work["cut"]).flatten()[:, None]
    difference = (start - behaviour) * mask
    if settings.get("correction") == "sequence":
        difference = difference.sum(-1, keepdim=True)
    inputs = {
        "prompt_ids": torch.zeros(len(now), 1).long(), "prompt_mask": torch.ones(len(now), 1).long(),
        "completion_ids": torch.zeros_like(mask).long(), "completion_mask": kept,
        "advantages": advantages.flatten(), "old_per_token_logps": start, "ref_per_token_logps": reference,
        "importance_sampling_ratio": difference.exp().clamp(max=2.0), "num_items_in_batch": kept.sum(),
    }  # fmt: skip
    trainer = MagicMock()
    trainer._get_per_token_logps_and_entropies.return_value = (now, torch.zeros_like(now), None)
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.importance_sampling_level = settings.get("level", "token")
    trainer.beta, trainer.loss_type = settings.get("beta", 0.0), settings["loss_type"]
    trainer.epsilon_low = settings.get("epsilon", 0.2)
    trainer.epsilon_high = settings.get("epsilon_high", trainer.epsilon_low)
    trainer.args.delta, trainer.args.use_bias_correction_kl = settings.get("delta"), False
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gather = lambda x: x  # for its metrics
    trainer.accelerator.num_processes, trainer.max_completion_length = 1, work["max_tokens"]
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = trainer.model.training = True
    trainer._entropy_bonus_enabled = trainer.aux_loss_enabled = False
    loss: Tensor = GRPOTrainer._compute_loss(trainer, MagicMock(), inputs)
    (gradient,) = torch.autograd.grad(loss, now)
    return {"loss": loss.item(), "gradient": gradient[mask.bool()].tolist()}


def padded(rows: list[list[float]]) -> Tensor:
    tensors = [torch.tensor(row).double() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=0.0)


if __name__ == "__main__":
    main()
