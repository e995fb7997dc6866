"""Names of the tensors in a policy's state: masters and moments by matrix and factor; a critic's have a prefix."""

import re
from collections.abc import Mapping

from torch import Tensor

from rlora.core.policy import Policies

CRITIC = "critic/"


def critic_of(policy: str) -> str:
    """The name of a policy's critic, which is a policy itself."""
    return f"{policy}/critic"


def split_critic(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the policy, and those of its critic without their prefix."""
    critic = {name.removeprefix(CRITIC): tensor for name, tensor in tensors.items() if name.startswith(CRITIC)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(CRITIC)}, critic


def is_by_position(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an old release wrote the state, which numbered the masters: the policy's, then its critic's."""
    return "0.master" in tensors


def with_current_names(tensors: Mapping[str, Tensor], policies: Policies, policy: str) -> dict[str, Tensor]:
    """The state under current names.

    Old releases numbered the masters. If any adapter of the policy or its critic covered a module, they numbered the
    A and B of all its matrices for both adapters; those of matrices that are not adapted were empty.
    """
    if not is_by_position(tensors):
        return dict(tensors)
    names = list(policies.parameters_of(policy))
    if not policies.full_weights:
        factors, owners = policies.bank.factors, {policy: "", critic_of(policy): CRITIC}
        pairs = {owner: policies.bank.pairs_of(owner) for owner in owners}
        modules = {matrix.module_name for adapted in pairs.values() for matrix in adapted}
        names = [
            f"{prefix}{matrix.key}.{factor}"
            for owner, prefix in owners.items()
            for matrix in factors
            for factor in ("lora_A", "lora_B")
            if pairs[owner] and matrix.module_name in modules
        ] + [f"{CRITIC}value_head.{name}" for name in ("weight", "bias")]
    renamed = {}
    for name, tensor in tensors.items():
        index, _, suffix = name.partition(".")
        is_numbered = re.fullmatch(r"\d+", index) and int(index) < len(names)
        if not (is_numbered and tensor.numel() == 0):
            renamed[f"{names[int(index)]}.{suffix}" if is_numbered else name] = tensor
    return renamed
