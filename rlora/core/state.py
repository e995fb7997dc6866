"""Names of the tensors in a policy's state: fp32 master weights and moments, keyed by matrix and factor."""

import re
from collections.abc import Mapping

from torch import Tensor

from rlora.core.policy import Policies

CRITIC = "critic/"


def critic_of(policy: str) -> str:
    """Return the name of a policy's critic, which is a policy itself."""
    return f"{policy}/critic"


def split_critic(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state into the tensors of the policy and those of its critic, whose names lose the prefix `critic/`."""
    critic = {name.removeprefix(CRITIC): tensor for name, tensor in tensors.items() if name.startswith(CRITIC)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(CRITIC)}, critic


def is_by_position(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether an old release wrote the state: master weights are keyed by index, not by matrix and factor."""
    return "0.master" in tensors


def with_current_names(tensors: Mapping[str, Tensor], policies: Policies, policy: str) -> dict[str, Tensor]:
    """Rename the tensors of an old state, `<index>.master`, to `<matrix>.<factor>.master`; likewise Adam's moments.

    The index counts A and B of every matrix in a module that the adapter of the policy or of its critic covers: first
    all of the policy's, then all of the critic's, then the value head. Tensors of matrices that the adapter does not
    cover are empty and are dropped. Current states, and tensors without an index, are returned unchanged.
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
