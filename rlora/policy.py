"""Policy = base + adapter -> token logprobs; with the adapter off it is the reference policy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlora import attention
from rlora.batch import Microbatch
from rlora.head import token_logprobs
from rlora.lora import add_lora
from rlora.records import RloraError


class Policy(nn.Module):
    """A frozen base with a rank-`rank` adapter over every linear layer except the output head.

    Raises RloraError where the base's logits are not its output head of its last hidden states.
    """

    def __init__(self, base: PreTrainedModel, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.base = base.eval()  # no dropout: the learner's policy has to be the engine's
        base.set_attn_implementation(attention.NAME)
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

    def logprobs(self, batch: Microbatch, temperature: float = 1.0) -> Tensor:
        """Natural log of each completion token's probability at the temperature the engine samples with: (C,) fp32.

        The whole row runs once through the base: a prompt is computed once for all its completions, whose gradients
        meet in it, and there are no pads.
        """
        hidden: Tensor = self.body(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, tree=batch.tree
        ).last_hidden_state[0]  # (N, hidden size)
        return token_logprobs(hidden[batch.predictors], self.head.weight, self.head.bias, batch.targets, temperature)
