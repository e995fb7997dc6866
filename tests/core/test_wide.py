"""Products of bf16 matrices in fp32, for CPUs that multiply them slowly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlora import device
from rlora.core.attention import _attention
from rlora.core.logprobs import token_logprobs
from rlora.core.lora import low_rank


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def product() -> tuple[list[Tensor], Callable[..., Tensor]]:
    weight = random(48, 32) / 6
    return [random(20, 32), random(2, 32) / 6, random(48, 2)], lambda x, a, b: low_rank(x, weight.to(x), None, a, b)


def head() -> tuple[list[Tensor], Callable[..., Tensor]]:
    weight, targets = random(100, 32), torch.arange(20)
    return [random(20, 32) / 6], lambda hidden: token_logprobs(hidden, weight.to(hidden), None, targets)


def attention() -> tuple[list[Tensor], Callable[..., Tensor]]:
    bias = torch.zeros(1, 1, 8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    return [random(1, 4, 8, 16), random(1, 2, 8, 16), random(1, 2, 8, 16)], lambda q, k, v: _attention(
        q, k, v, bias.to(q), 0.25
    )


@pytest.mark.parametrize("case", [product, head, attention])
def test_products_and_gradients_are_those_of_fp32_rounded_once(
    case: Callable[[], tuple[list[Tensor], Callable[..., Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "multiplies_in_16_bits", lambda: False)
    inputs, function = case()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = function(*leaves)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(y.dtype)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for narrow, exact in zip(*results, strict=True):
        assert narrow.dtype in (torch.bfloat16, torch.float32)
        assert (narrow.float() - exact).norm() < 6e-3 * exact.norm()  # bf16 has 8 digits


def test_only_bf16_on_the_cpu_becomes_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(2, 3)
    for fast in (True, False):
        monkeypatch.setattr(device, "multiplies_in_16_bits", lambda fast=fast: fast)
        narrow, single, meta, nothing = device.wide(x, x.float(), x.to("meta"), None)
        assert narrow.dtype == (torch.bfloat16 if fast else torch.float32)
        assert (single.dtype, meta.dtype, nothing) == (torch.float32, torch.bfloat16, None)
