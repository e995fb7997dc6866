"""Policy = base + adapter -> token logprobs; with the adapter off the reference policy, with the critic's values."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlora.core import attention
from rlora.core.batch import Microbatch
from rlora.core.logprobs import logprobs_and_entropies, token_logprobs
from rlora.core.lora import Bank, Route, Spec
from rlora.records import RloraError

CRITIC = 1  # its adapter's place in the bank; the policy's is 0


class Policy(nn.Module):
    """A frozen base with a bank of adapters over its weight matrices; without `adapters` the base itself is trained.

    With `critic` the adapter CRITIC is that of a critic, which has a head of its own for values; it starts at 0. With
    `checkpointing`, the backward pass computes each layer's activations again instead of keeping them. Raises
    RloraError where the base's logits are not its output head of its last hidden states.
    """

    def __init__(
        self, base: PreTrainedModel, adapters: Sequence[Spec], seed: int, checkpointing: bool = False,
        critic: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base = base.eval()  # no dropout: the learner's policy has to be the engine's
        base.set_attn_implementation(attention.NAME)
        self.body, self.head = base.base_model, base.get_output_embeddings()
        with torch.no_grad():  # some models cap or scale their logits
            probe = torch.tensor([[1, 2]], device=base.device)
            if self.head is None or not base(probe).logits.equal(self.head(self.body(probe).last_hidden_state)):
                raise RloraError(f"model: {type(base).__name__} does more with its logits than its output head; "
                                 "such models can't be trained yet, use another one")  # fmt: skip
        self.bank = Bank(base, adapters, seed)
        if checkpointing:
            if not hasattr(self.body, "layers"):
                raise RloraError(
                    f"learner.checkpointing = true: {type(base).__name__} has no list of layers; leave it off"
                )
            for layer in cast(nn.ModuleList, self.body.layers):
                layer.forward = self._computed_again(layer.forward)
        self.value_head = None
        if critic:
            self.value_head = nn.Linear(cast(int, self.head.in_features), 1, device=base.device)
            nn.init.zeros_(self.value_head.weight), nn.init.zeros_(self.value_head.bias)
        self.head_factors = next((f for matrix, f in self.bank.factors.items() if matrix.kind == "head"), None)

    def _computed_again(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward pass that keeps its inputs alone; transformers' own is off outside of training mode."""

        def checkpointed(*arguments: Any, **options: Any) -> Any:
            route = self.bank.routing.route

            def again(*arguments: Any, **options: Any) -> Any:
                with self.bank.serving(route):  # in the backward pass the bank may follow another
                    return forward(*arguments, **options)

            return checkpoint(again, *arguments, use_reentrant=False, **options)

        return checkpointed

    def logprobs(self, batch: Microbatch, temperature: float = 1.0) -> Tensor:
        """Natural log of each completion token's probability at the temperature the engine samples with: (C,) fp32.

        The whole row runs once through the base: a prompt is computed once for all its completions, whose gradients
        meet in it, and there are no pads. Each token meets the adapter that `batch` gives it: with `lora.OFF` these are
        the reference policy's.
        """
        return self.logprobs_of(self._hidden(batch)[batch.predictors], batch, temperature)

    def read(self, batch: Microbatch) -> list[tuple[Microbatch, Tensor]]:
        """One pass over the base for all adapters of the row: each one's part of it, and the last hidden states at the
        part's predictors (C, hidden size), for the three methods that follow."""
        hidden = self._hidden(batch)
        return [(part, hidden[part.predictors]) for part in batch.parts()]

    def logprobs_of(self, hidden: Tensor, part: Microbatch, temperature: float = 1.0) -> Tensor:
        """Each completion token's logprob: (C,) fp32."""
        head, adapter = (self.head.weight, self.head.bias), self._over_head(part, hidden.dtype)
        if adapter or self.head.weight.requires_grad:
            return logprobs_and_entropies(hidden, *head, adapter, part.targets, temperature)[0]
        return token_logprobs(hidden, *head, part.targets, temperature)

    def logprobs_and_entropies_of(
        self, hidden: Tensor, part: Microbatch, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Also the entropy in nats of what each completion token was drawn from: (C,) fp32 each."""
        head, adapter = (self.head.weight, self.head.bias), self._over_head(part, hidden.dtype)
        return logprobs_and_entropies(hidden, *head, adapter, part.targets, temperature)

    def values_of(self, hidden: Tensor) -> Tensor:
        """What the critic expects of the text before each of its part's next tokens: (C,) fp32."""
        assert self.value_head is not None
        return self.value_head(hidden.float())[:, 0]  # type: ignore[no-any-return]

    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that learn: the policy's, and those of the critic's adapter and head."""
        of_critic: list[nn.Parameter] = []
        if self.value_head is not None:
            factors = self.bank.factors.values()
            of_critic = [each[CRITIC] for of in factors for each in (of.lora_A, of.lora_B)] + [
                *self.value_head.parameters()
            ]
        its = {id(weight) for weight in of_critic}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in its], of_critic

    def _hidden(self, batch: Microbatch) -> Tensor:
        """The base's last hidden states of the row: (N, hidden size)."""
        with self.bank.serving(Route(batch.adapters)):
            hidden: Tensor = self.body(
                input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, tree=batch.tree
            ).last_hidden_state[0]
        return hidden

    def _over_head(self, batch: Microbatch, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What the batch's adapters have over the output head; None where they leave it alone."""
        if self.head_factors is None:
            return None
        adapters = batch.adapters
        whose = adapters if isinstance(adapters, int) else adapters[batch.predictors]
        return self.head_factors.stacked(Route(whose), dtype)
