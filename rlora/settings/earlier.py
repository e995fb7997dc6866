"""Fields that earlier releases had, and the fields that replace them."""

from collections.abc import Mapping
from typing import Any

REPLACED = {"algorithm.kl_in", "algorithm.drop_truncated", "algorithm.bootstrap_truncated"}


def replaced(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the section `algorithm`, with those of earlier releases replaced by current fields.

    `kl_in` follows from `kl_estimator`: k1 is in the reward, the others are in the loss. `drop_truncated` and
    `bootstrap_truncated` are values of `truncated`.
    """
    current = dict(fields)
    if current.pop("kl_in", "loss") == "reward":
        current.setdefault("kl_estimator", "k1")
    for name in ("drop", "bootstrap"):
        if current.pop(f"{name}_truncated", False) is True:
            current["truncated"] = name
    return current
