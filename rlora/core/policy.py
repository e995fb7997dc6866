"""Policies = frozen base + an adapter each -> token logprobs; under no adapter the reference policy, and critics."""

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
    """What a policy gives for C targets: (C,) float32 each."""

    logprobs: Tensor
    entropies: Tensor | None = None  # nats, of the distribution that the target was drawn from; None: not asked for


class Policies:
    """A frozen base with a bank of adapters over its weight matrices, and a head for each critic's values.

    With `whole` there are no adapters, and one policy is the base itself, which is trained. With `checkpointing` the
    backward pass computes each layer's activations again instead of keeping them. Raises RloraError where the base's
    logits are not its output head of its last hidden states.
    """

    def __init__(self, base: PreTrainedModel, checkpointing: bool = False, whole: bool = False) -> None:
        self.base = base.eval()  # no dropout: the learner's policy has to be the engine's
        self.body, self.head = base.base_model, base.get_output_embeddings()
        base.set_attn_implementation(attention.NAME)
        self._check_logits()
        self.full_weights = whole
        self.bank = Bank(base, [] if whole else None)
        base.requires_grad_(whole)
        self.value_heads: dict[str, nn.Linear] = {}
        if checkpointing:
            if not hasattr(self.body, "layers"):
                raise RloraError(
                    f"learner.checkpointing = true: {type(base).__name__} has no list of layers; leave it off"
                )
            for layer in cast(nn.ModuleList, self.body.layers):
                layer.forward = self._computed_again(layer.forward)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Raise RloraError where the model caps or scales its logits. Without memory for its weights it has none."""
        if self.base.device.type == "meta":
            return
        probe = torch.tensor([[1, 2]], device=self.base.device)
        if self.head is None or not self.base(probe).logits.equal(self.head(self.body(probe).last_hidden_state)):
            raise RloraError(
                f"model: {type(self.base).__name__} does more with its logits than its output head; such models can't "
                "be trained yet, use another one"
            )

    def add(self, name: str, spec: Spec, seed: int, values: bool = False) -> None:
        """A new adapter, whose policy is the base; with `values` it is a critic's, whose values are 0."""
        self.bank.add(name, spec, seed)
        if values:
            head = self.value_heads[name] = nn.Linear(cast(int, self.head.in_features), 1, device=self.base.device)
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)

    def remove(self, name: str) -> None:
        self.value_heads.pop(name, None)
        self.bank.remove(name)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """What is trained of one policy, by matrix and factor; without adapters the base's weights by their names."""
        if self.full_weights:
            return dict(self.base.named_parameters())
        head = self.value_heads.get(name)
        own = {f"value_head.{key}": weight for key, weight in head.named_parameters()} if head else {}
        return self.bank.parameters_of(name) | own

    def logprobs(self, row: Microbatch, under: str | None, temperature: float = 1.0) -> Tensor:
        """Natural log of each target's probability at the temperature the engine samples with: (C,) fp32.

        The whole row runs once through the base: a prompt is computed once for all its completions, whose gradients
        meet in it, and there are no pads. `under` names the adapter; None is the reference policy.
        """
        return self.outputs(row, under, temperature).logprobs

    def outputs(self, row: Microbatch, under: str | None, temperature: float = 1.0, entropies: bool = False) -> Outputs:
        """The logprobs, and the entropies where they are asked for: by another kernel, which rounds otherwise."""
        hidden, head = self._hidden(row, under), (self.head.weight, self.head.bias)
        over_head = self._over_head(under, hidden.dtype)
        if entropies or over_head or self.full_weights:
            both = logprobs_and_entropies(hidden, *head, over_head, row.targets, temperature)
            return Outputs(both[0], both[1] if entropies else None)
        return Outputs(token_logprobs(hidden, *head, row.targets, temperature))

    def values(self, row: Microbatch, critic: str) -> Tensor:
        """What a critic expects of the text up to each of the row's predictors: (C,) fp32."""
        return self.value_heads[critic](self._hidden(row, critic).float())[:, 0]  # type: ignore[no-any-return]

    def adapts_head(self, name: str) -> bool:
        return any(matrix.kind == "head" for matrix in self.bank.over(name))

    def _hidden(self, row: Microbatch, under: str | None) -> Tensor:
        """The base's last hidden states at the row's predictors: (C, hidden size)."""
        with self.bank.serving(under):
            hidden: Tensor = self.body(
                input_ids=row.input_ids[None], position_ids=row.position_ids[None], use_cache=False, layout=row.layout
            ).last_hidden_state[0]
        return hidden[row.predictors]

    def _over_head(self, under: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """What an adapter has over the output head; None where it leaves that alone."""
        factors = next((of for matrix, of in self.bank.factors.items() if matrix.kind == "head"), None)
        with self.bank.serving(under):
            return factors.served(dtype) if factors else None

    def _computed_again(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward pass that keeps its inputs alone; transformers' own is off outside of training mode."""

        def checkpointed(*arguments: Any, **options: Any) -> Any:
            under = self.bank.serves.adapter

            def again(*arguments: Any, **options: Any) -> Any:
                with self.bank.serving(under):  # in the backward pass the bank may serve another
                    return forward(*arguments, **options)

            return checkpoint(again, *arguments, use_reentrant=False, **options)

        return checkpointed
