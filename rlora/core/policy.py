"""Policies over one frozen base: logprobs with an adapter or, as the reference policy, without; critics' values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlora.core import attention
from rlora.core.batch import Microbatch
from rlora.core.logprobs import logprobs_and_entropies, token_logprobs
from rlora.core.lora import Bank, Spec
from rlora.records import RloraError


@dataclass(frozen=True, eq=False)
class Outputs:
    """A policy's outputs for C targets: (C,) float32 each."""

    logprobs: Tensor
    entropies: Tensor | None = None  # nats, of each target's distribution; None if they were not computed


class Policies:
    """A frozen base with a bank of adapters over its weight matrices, and a value head for each critic.

    With `full_weights` there are no adapters; the only policy is the base itself, which is trained. With
    `checkpointing` the backward pass recomputes each layer's activations instead of keeping them. Raises RloraError if
    the base's logits are not simply its output head applied to its last hidden states.
    """

    def __init__(self, base: PreTrainedModel, checkpointing: bool = False, full_weights: bool = False) -> None:
        self.base = base.eval()  # no dropout: the learner's policy must equal the engine's
        self.body, self.head = base.base_model, base.get_output_embeddings()
        base.set_attn_implementation(attention.NAME)
        self._check_logits()
        self.full_weights = full_weights
        self.bank = Bank(base, [] if full_weights else None)
        base.requires_grad_(full_weights)
        self.value_heads: dict[str, nn.Linear] = {}
        if checkpointing:
            if not hasattr(self.body, "layers"):
                raise RloraError(
                    f"learner.checkpointing = true: {type(base).__name__} has no list of layers to checkpoint; set "
                    "learner.checkpointing = false"
                )
            for layer in cast(nn.ModuleList, self.body.layers):
                layer.forward = self._checkpointed(layer.forward)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Raise RloraError if the model caps or scales its logits."""
        if self.base.device.type == "meta":  # there are no values to compare
            return
        probe = torch.tensor([[1, 2]], device=self.base.device)
        if self.head is None or not self.base(probe).logits.equal(self.head(self.body(probe).last_hidden_state)):
            raise RloraError(
                f"model: {type(self.base).__name__} changes its logits after the output head (for example, it caps "
                "them), which rlora does not support; use a different model"
            )

    def add(self, name: str, spec: Spec, seed: int, values: bool = False) -> None:
        """Add a policy with a new adapter, whose outputs equal the base's at first. If `values` is set, the adapter has
        a value head, for a critic that predicts 0 for every token."""
        self.bank.add(name, spec, seed)
        if values:
            head = self.value_heads[name] = nn.Linear(cast(int, self.head.in_features), 1, device=self.base.device)
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)

    def remove(self, name: str) -> None:
        self.value_heads.pop(name, None)
        self.bank.remove(name)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Return a policy's parameters, keyed by matrix and factor; with `full_weights` the base's weights by name."""
        if self.full_weights:
            return dict(self.base.named_parameters())
        head = self.value_heads.get(name)
        head_parameters = {f"value_head.{key}": weight for key, weight in head.named_parameters()} if head else {}
        return self.bank.parameters_of(name) | head_parameters

    def logprobs(self, row: Microbatch, name: str | None, temperature: float = 1.0) -> Tensor:
        """Compute the natural log of each target's probability at the engine's sampling temperature: (C,) fp32.

        The row runs through the base once. A prompt is computed once for all its completions, and receives the sum of
        the gradients of all its completions. With `name` None the policy is the reference: the base without adapter.
        """
        return self.outputs(row, name, temperature).logprobs

    def outputs(self, row: Microbatch, name: str | None, temperature: float = 1.0, entropies: bool = False) -> Outputs:
        """Compute logprobs, and with `entropies` also entropies, by a different kernel with different rounding."""
        hidden, head = self._hidden(row, name), (self.head.weight, self.head.bias)
        head_factors = self._head_factors(name, hidden.dtype)
        if entropies or head_factors or self.full_weights:
            pair = logprobs_and_entropies(hidden, *head, head_factors, row.targets, temperature, row.support)
            return Outputs(pair[0], pair[1] if entropies else None)
        return Outputs(token_logprobs(hidden, *head, row.targets, temperature, row.support))

    def values(self, row: Microbatch, critic: str) -> Tensor:
        """Compute a critic's values of the text up to each of the row's predictors: (C,) fp32."""
        return self.value_heads[critic](self._hidden(row, critic).float())[:, 0]  # type: ignore[no-any-return]

    def adapts_head(self, name: str) -> bool:
        """Return whether the policy's adapter covers the output head."""
        return any(matrix.kind == "head" for matrix in self.bank.pairs_of(name))

    def _hidden(self, row: Microbatch, name: str | None) -> Tensor:
        """Compute the last hidden states at the row's predictors: (C, hidden size)."""
        with self.bank.serving(name):
            hidden: Tensor = self.body(
                input_ids=row.input_ids[None], position_ids=row.position_ids[None], use_cache=False, layout=row.layout
            ).last_hidden_state[0]
        return hidden[row.predictors]

    def _head_factors(self, name: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return A and B of the adapter over the output head; None if the head is not adapted."""
        factors = next((factors for matrix, factors in self.bank.factors.items() if matrix.kind == "head"), None)
        with self.bank.serving(name):
            return factors.served(dtype) if factors else None

    def _checkpointed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a layer's forward pass that keeps only the inputs; transformers' checkpointing is off in eval mode."""

        def checkpointed(*arguments: Any, **options: Any) -> Any:
            served = self.bank.serves.adapter

            def recompute(*arguments: Any, **options: Any) -> Any:
                with self.bank.serving(served):  # during the backward pass the bank may serve a different one
                    return forward(*arguments, **options)

            return checkpoint(recompute, *arguments, use_reentrant=False, **options)

        return checkpointed
