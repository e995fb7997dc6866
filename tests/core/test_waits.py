"""A GPU computes while the host prepares the next row: nothing in a row may ask it for a number."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Solo, episode
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlora.core import batch
from rlora.core.batch import sample_of
from rlora.core.flash import Lengths, Segments
from rlora.settings import Config

MakeConfig = Callable[..., Config]
_ASKING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::masked_select", "aten::equal")


class Waits(TorchDispatchMode):
    """Counts what a host would wait for on a GPU: numbers that are read, and shapes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        name = operation.name().split(".")[0]
        by_mask = name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        unknown = name == "aten::repeat_interleave" and options.get("output_size") is None
        if name in _ASKING or by_mask or unknown:
            self.seen[name] += 1
        return operation(*arguments, **options)


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Within it, what is waited for: copies to the CPU too, which look like nothing on a CPU."""

    def copied(tensor: Tensor) -> Tensor:
        counting.seen["cpu"] += 1
        return tensor

    counting = Waits()
    with mock.patch.object(Tensor, "cpu", copied), counting:
        yield counting.seen


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def layout_of(lengths: Lengths, dtype: torch.dtype, device: torch.device) -> Segments:
        return Segments.of(lengths, device)

    monkeypatch.setattr(batch, "layout_of", layout_of)
    kernels = lambda *_: iter(())  # noqa: E731  # the reference for the kernels reads where segments end
    monkeypatch.setattr("rlora.core.flash._stretches", kernels)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("algorithm", ["reinforce", "grpo", "gspo", "cispo", "reinforce++"])
def test_no_row_waits(tiny: str, config: MakeConfig, algorithm: str) -> None:
    settings = {"name": algorithm, "correction": "episode-truncate"} if algorithm == "gspo" else {"name": algorithm}
    found = []
    for tokens in (1, 10_000):  # six rows, and one
        learner = Solo(config(algorithm=settings, learner={"microbatch_tokens": tokens}), tiny)
        groups = [[sample_of((3, 4, 5), episode((6, 7, 8), reward=1.0), 0.5)] for _ in range(6)]
        known = {"start_logprobs": torch.zeros(3), "reference_logprobs": torch.zeros(3)}
        groups = [[sample.with_tokens(**known) for sample in of] for of in groups]
        held = learner.learner.held[learner.name]
        with waits() as seen:
            learner.learner.forward_backward(learner.name, groups, held.objective.loss)
        found.append(seen)
    assert found[0] == found[1]
    assert sum(found[0].values()) < 10


def test_a_wait_is_seen() -> None:
    with waits() as seen:
        x = torch.arange(3)
        x[x > 1].sum().item()
        x.repeat_interleave(torch.tensor([1, 0, 2]))
        x.cpu()
    assert seen == {"aten::index": 1, "aten::_local_scalar_dense": 1, "aten::repeat_interleave": 1, "cpu": 1}
