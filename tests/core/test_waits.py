"""The host prepares the next row while a GPU computes, so nothing in a row may synchronise with the GPU."""

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
_SYNCHRONISING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::masked_select", "aten::equal")


class Waits(TorchDispatchMode):
    """Counts operations that synchronise with a GPU: reads of a value, and shapes that depend on one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        name = operation.name().split(".")[0]
        by_mask = name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        unknown_size = name == "aten::repeat_interleave" and options.get("output_size") is None
        if name in _SYNCHRONISING or by_mask or unknown_size:
            self.counts[name] += 1
        return operation(*arguments, **options)


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Context that yields the counts, with copies to the CPU, which are no operation if the tensor is on a CPU."""

    def cpu(tensor: Tensor) -> Tensor:
        mode.counts["cpu"] += 1
        return tensor

    mode = Waits()
    with mock.patch.object(Tensor, "cpu", cpu), mode:
        yield mode.counts


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def layout_of(lengths: Lengths, dtype: torch.dtype, device: torch.device) -> Segments:
        return Segments.from_lengths(lengths, device)

    monkeypatch.setattr(batch, "layout_of", layout_of)
    no_slices = lambda *_: iter(())  # noqa: E731  # the reference implementation would read the cumulative lengths
    monkeypatch.setattr("rlora.core.flash._slices", no_slices)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("algorithm", ["reinforce", "grpo", "gspo", "cispo", "reinforce++"])
def test_no_row_waits(tiny: str, config: MakeConfig, algorithm: str) -> None:
    settings = {"name": algorithm, "correction": "episode-truncate"} if algorithm == "gspo" else {"name": algorithm}
    results = []
    for tokens in (1, 10_000):  # six rows, and one
        learner = Solo(config(algorithm=settings, learner={"microbatch_tokens": tokens}), tiny)
        groups = [[sample_of((3, 4, 5), episode((6, 7, 8), reward=1.0), 0.5)] for _ in range(6)]
        logprobs = {"start_logprobs": torch.zeros(3), "reference_logprobs": torch.zeros(3)}
        groups = [[sample.with_tokens(**logprobs) for sample in group] for group in groups]
        objective = learner.learner.states[learner.name].objective
        with waits() as counts:
            learner.learner.forward_backward(learner.name, groups, objective.loss)
        results.append(counts)
    assert results[0] == results[1]
    assert sum(results[0].values()) < 10


def test_waits_are_counted() -> None:
    with waits() as counts:
        x = torch.arange(3)
        x[x > 1].sum().item()
        x.repeat_interleave(torch.tensor([1, 0, 2]))
        x.cpu()
    assert counts == {"aten::index": 1, "aten::_local_scalar_dense": 1, "aten::repeat_interleave": 1, "cpu": 1}
