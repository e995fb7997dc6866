"""Policy = base + adapter -> token logprobs; with the adapter off it is the reference policy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rlora.lora import add_lora


class Policy(nn.Module):
    """A frozen base with a rank-`rank` adapter over every linear layer except the output head."""

    def __init__(self, base: PreTrainedModel, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.layers = add_lora(base, rank, alpha, seed)  # by module name
        self.base = base.eval()  # no dropout: the learner's policy has to be the engine's

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Within it, the policy is the base."""
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True

    def logits(self, prompt_ids: Tensor, completion_ids: Tensor) -> Tensor:
        """Logits of each completion token, given what stands before it. (P,), (B, T) -> (B, T, V), the base's dtype.

        The prompt runs once: the keys and values of all its tokens but the last are shared by the B completions, and
        gradients flow back through them. The last prompt token is computed with each completion, whose first token
        it predicts.
        """
        rows = completion_ids.shape[0]
        cache = DynamicCache()
        if len(prompt_ids) > 1:
            self.base(input_ids=prompt_ids[None, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(rows)
        inputs = torch.cat([prompt_ids[-1:].expand(rows, 1), completion_ids[:, :-1]], dim=1)  # (B, T)
        logits: Tensor = self.base(input_ids=inputs, past_key_values=cache, use_cache=True).logits
        return logits

    def logprobs(self, prompt_ids: Tensor, completion_ids: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(completion token), at the temperature the engine samples with. (P,), (B, T) -> (B, T) float32"""
        logits = self.logits(prompt_ids, completion_ids).float() / temperature
        return logits.log_softmax(dim=-1).gather(-1, completion_ids[..., None]).squeeze(-1)
