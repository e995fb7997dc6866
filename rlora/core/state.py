"""How a policy's state names its tensors: masters and moments by matrix and factor, its critic's after a prefix."""

import re
from collections.abc import Mapping

from torch import Tensor

from rlora.core.policy import Policies

CRITIC = "critic/"


def critic_of(policy: str) -> str:
    """The name of a policy's critic, which is a policy too."""
    return f"{policy}/critic"


def parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is the policy's own, and its critic's."""
    of_critic = {name.removeprefix(CRITIC): each for name, each in tensors.items() if name.startswith(CRITIC)}
    return {name: each for name, each in tensors.items() if not name.startswith(CRITIC)}, of_critic


def is_by_position(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a release wrote it that numbered masters: a policy's and then its critic's."""
    return "0.master" in tensors


def by_name(tensors: Mapping[str, Tensor], policies: Policies, policy: str) -> dict[str, Tensor]:
    """The state as it is named now. Those of older releases had an empty master where an adapter leaves a matrix alone
    that its companion, or the other matrix of its module, is over."""
    if not is_by_position(tensors):
        return dict(tensors)
    names = list(policies.parameters_of(policy))
    if not policies.full_weights:
        factors, owners = policies.bank.factors, {policy: "", critic_of(policy): CRITIC}
        over = {owner: policies.bank.over(owner) for owner in owners}
        places = {matrix.place for of in over.values() for matrix in of}
        names = [
            f"{prefix}{matrix.key}.{factor}"
            for owner, prefix in owners.items()
            for matrix in factors
            for factor in ("lora_A", "lora_B")
            if over[owner] and matrix.place in places
        ] + [f"{CRITIC}value_head.{name}" for name in ("weight", "bias")]
    renamed = {}
    for name, tensor in tensors.items():
        index, _, what = name.partition(".")
        known = re.fullmatch(r"\d+", index) and int(index) < len(names)
        if not (known and tensor.numel() == 0):
            renamed[f"{names[int(index)]}.{what}" if known else name] = tensor
    return renamed
