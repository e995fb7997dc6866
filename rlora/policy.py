"""Policy = base + adapter -> token logprobs; with the adapter off it is the reference policy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from rlora.batch import Microbatch
from rlora.lora import add_lora
from rlora.records import RloraError


class Policy(nn.Module):
    """A frozen base with a rank-`rank` adapter over every linear layer except the output head.

    Raises RloraError where the base's logits are not its output head of its last hidden states.
    """

    def __init__(self, base: PreTrainedModel, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.base = base.eval()  # no dropout: the learner's policy has to be the engine's
        self.body, self.head = base.base_model, base.get_output_embeddings()
        with torch.no_grad():  # some models cap or scale their logits
            probe = torch.tensor([[1, 2]], device=base.device)
            if self.head is None or not base(probe).logits.equal(self.head(self.body(probe).last_hidden_state)):
                raise RloraError(f"model: {type(base).__name__} does more with its logits than its output head; "
                                 "such models can't be trained yet, use another one")  # fmt: skip
        self.layers = add_lora(base, rank, alpha, seed)  # by module name

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

    def logits(self, batch: Microbatch) -> Tensor:
        """Logits of each completion token, given what stands before it: (N, V), in the base's dtype.

        A prompt runs once: the keys and values of all its tokens but the last are shared by its completions, and
        gradients flow back through them. Its last token runs with each completion, whose first token it predicts.
        """
        cache = DynamicCache()
        shared = int(batch.prompt_lengths.max()) - 1
        if shared:
            self.body(input_ids=batch.prompt_ids[:, :shared], past_key_values=cache, use_cache=True)
            cache.batch_select_indices(batch.prompt_of_row)
        rows, length = batch.completion_ids.shape
        first = (batch.prompt_lengths - 1)[batch.prompt_of_row, None]  # (B, 1), the position of the last prompt token
        last_prompt_ids = batch.prompt_ids[batch.prompt_of_row].gather(1, first)
        offsets = torch.arange(length, device=first.device)
        seen = torch.arange(shared, device=first.device) < first  # (B, shared): pads of shorter prompts stay unseen
        hidden = self.body(
            input_ids=torch.cat([last_prompt_ids, batch.completion_ids[:, :-1]], dim=1),  # (B, T)
            attention_mask=torch.cat([seen, seen.new_ones(rows, length)], dim=1),
            position_ids=first + offsets,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits: Tensor = self.head(hidden[batch.mask])
        return logits

    def logprobs(self, batch: Microbatch, temperature: float = 1.0) -> Tensor:
        """Natural log of each completion token's probability at the temperature the engine samples with: (N,) fp32."""
        logits = self.logits(batch).float()
        if temperature != 1.0:
            logits = logits / temperature
        return -cross_entropy(logits, batch.completion_ids[batch.mask], reduction="none")
