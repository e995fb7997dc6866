"""TRL's part of losses.py: `GRPOTrainer._compute_loss` for given logprobs.

It runs in TRL's environment, `python peer_losses.py <work.json> <measured.json>`, and does not import rlora. The
trainer is a stand-in with the settings and the logprobs; any other attribute raises AttributeError. The loss is TRL's
code. Advantages and the engine's importance ratio, which TRL computes elsewhere, are computed here.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    measured = {name: of_case(work, settings) for name, settings in work["cases"].items()}
    Path(sys.argv[2]).write_text(json.dumps(measured))


def of_case(work: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    lengths = torch.tensor([len(row) for row in work["now"]])
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
    training = SimpleNamespace(training=True)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros_like(now), None),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=settings.get("level", "token"),
        beta=settings.get("beta", 0.0), loss_type=settings["loss_type"], epsilon_low=settings.get("epsilon", 0.2),
        epsilon_high=settings.get("epsilon_high", settings.get("epsilon", 0.2)), model=training,
        args=SimpleNamespace(
            delta=settings.get("delta"), use_bias_correction_kl=False, steps_per_generation=1, num_iterations=1,
        ),
        current_gradient_accumulation_steps=1, max_completion_length=work["max_tokens"], use_vllm=True,
        vllm_importance_sampling_correction=True, _entropy_bonus_enabled=False, aux_loss_enabled=False,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    loss: Tensor = GRPOTrainer._compute_loss(trainer, training, inputs)
    (gradient,) = torch.autograd.grad(loss, now)
    return {"loss": loss.item(), "gradient": gradient[mask.bool()].tolist()}


def padded(rows: list[list[float]]) -> Tensor:
    tensors = [torch.tensor(row).double() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=0.0)


if __name__ == "__main__":
    main()
