"""The replacements for parts of vLLM's CPU build, against plain loops and known probabilities."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # importing vLLM warns
SLOTS = {7: 0, 9: 1}  # by LoRA id


@pytest.mark.parametrize(("max_rank", "rank"), [(1, 1), (8, 1), (8, 2), (8, 3), (8, 5), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(4,), (4, 2)])
@pytest.mark.parametrize("ids", [(7, 7, 7, 7), (7, 0, 9, 7), (0, 0, 0, 0)])
def test_each_row_gets_its_own_adapter_or_none(
    ids: tuple[int, ...], widths: tuple[int, ...], dtype: torch.dtype, max_rank: int, rank: int
) -> None:
    from vllm.lora.layers import LoRAMapping

    from rlora.engine.cpu.patches import ThinProducts, fuse_slots, set_rank

    torch.manual_seed(0)
    d_in = 5
    layer: Any = SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(2, 1, max_rank, d_in, dtype=dtype) for _ in widths),
        lora_b_stacked=tuple(torch.zeros(2, 1, width, max_rank, dtype=dtype) for width in widths),
    )
    model = SimpleNamespace(lora_manager=SimpleNamespace(modules={"qkv_proj": layer}, lora_index_to_id=[7, 9]))
    fuse_slots(model)
    for part in (*layer.lora_a_stacked, *layer.lora_b_stacked):
        part[0].normal_(), part[1].normal_()  # like vLLM: one slot of one part at a time
    ranks = rank, 1
    for slot, (adapter, slot_rank) in enumerate(zip(SLOTS, ranks, strict=True)):
        set_rank(model, adapter, slot_rank)
        rows = next(count for count in (1, 2, 4, 8) if count >= slot_rank)
        for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            a[slot, 0, slot_rank:], b[slot, 0, :, slot_rank:] = 0.0, 0.0  # like vLLM's padding
            a[slot, 0, rows:], b[slot, 0, :, rows:] = torch.nan, torch.nan  # must not be read
    x, y = torch.randn(4, d_in).to(dtype), torch.randn(4, sum(widths)).to(dtype)
    expected = y.double()
    for row, adapter in enumerate(ids):
        if adapter:
            slot = SLOTS[adapter]
            parts = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
            r = ranks[slot]
            expected[row] += torch.cat(
                [b[slot, 0, :, :r].double() @ a[slot, 0, :r].double() @ x[row].double() for a, b in parts]
            )
    products = ThinProducts(16, 4, torch.device("cpu"))
    products.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [7, 9], 3, 100)
    got = y.clone()
    products.add_lora_linear(got, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, widths)
    torch.testing.assert_close(got, expected.to(dtype))
    if dtype == torch.bfloat16:  # rounded once, to the nearest
        assert got.equal(expected.to(dtype))
    base_rows = [row for row, adapter in enumerate(ids) if not adapter]
    assert got[base_rows].equal(y[base_rows])
    if len(widths) == 1:
        padded = torch.cat([y, y[:, :1]], 1)
        got = padded[:, :-1]
        products.add_lora_logits(padded, x, layer.lora_a_stacked[0], layer.lora_b_stacked[0], 1.0)
        torch.testing.assert_close(got, expected.to(dtype))


def test_without_a_cache_directory_code_is_compiled_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import CacheImpl

    from rlora.engine.cpu import product

    def add_one(number: int) -> int:
        return number + 1

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert product._compile(add_one)(1) == 2


def test_tokens_are_drawn_with_their_probabilities() -> None:
    from rlora.engine.cpu.sampling import draw

    torch.manual_seed(0)
    count = 100_000
    p = torch.tensor([0.0, 0.5, 0.0, 0.2499, 0.2, 1e-4, 0.05, 0.0])
    sampler: Any = SimpleNamespace(logprobs_mode="processed_logprobs")
    tokens, logprobs = draw(sampler, p.log().expand(count, -1), {}, None, None)
    drawn = torch.bincount(tokens, minlength=len(p)) / count
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()  # exactly 0 if p is 0
    assert logprobs is not None
    torch.testing.assert_close(logprobs[0].exp(), p)


def test_draws_over_blocks_of_the_vocabulary() -> None:
    """1,000 tokens are no multiple of a block; whole blocks, and the last token of each, have no probability."""
    from rlora.engine.cpu.sampling import invert

    torch.manual_seed(0)
    count, p = 200_000, torch.rand(1000)
    p[256:512] = p[255] = p[999] = p[0] = 0.0
    p /= p.sum()
    drawn = torch.cat(
        [torch.bincount(invert(part), minlength=1000)[None] for part in p.expand(count, -1).split(20_000)]
    )
    share = drawn.sum(0) / count
    assert ((share - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
    peaked = torch.full((1000, 49152), -200.0)
    peaked[:, 300] = 0.0
    assert (invert(peaked.softmax(1)) == 300).all()


@pytest.mark.parametrize(
    ("k", "p"),
    [(None, [0.9, 0.3, 1.0]), ([5, 97, 1], None), ([50, 97, 8], [0.5, 0.999, 0.9]), ([97, 97, 97], [1.0, 1.0, 1.0])],
)
def test_the_tokens_that_vllm_keeps_are_kept(k: list[int] | None, p: list[float] | None) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    from rlora.engine.cpu.sampling import Masks, truncate

    torch.manual_seed(0)
    logits = torch.randn(3, 97) * 3
    ks = None if k is None else torch.tensor(k, dtype=torch.int32)
    ps = None if p is None else torch.tensor(p)
    expected, ours = apply_top_k_top_p(logits.clone(), ks, ps), logits.clone()
    truncate(ours, ks, ps)
    assert torch.equal(ours, expected)
    Masks.of(ours)
    assert Masks.ids is not None
    for row, (start, end) in zip(expected, pairwise(Masks.offsets), strict=True):
        kept = (row > -torch.inf).nonzero()[:, 0].tolist()
        assert Masks.ids[start:end].tolist() == (kept if len(kept) < 97 else [])
    Masks.ids = None


def test_a_flat_nucleus_is_found_too() -> None:
    from rlora.engine.cpu.sampling import truncate

    logits = torch.zeros(2, 5000)
    logits[1, 7] = 20.0
    truncate(logits, None, torch.tensor([0.4999, 0.5]))
    assert (logits > -torch.inf).sum(1).tolist() == [2500, 1]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", [64, 2**14])  # entries of a block: one row, and four blocks, the last one smaller
def test_a_product_over_blocks_is_the_product(biased: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlora import device
    from rlora.engine.cpu import patches

    monkeypatch.setattr(device, "multiplies_in_16_bits", lambda: False)
    monkeypatch.setattr(patches, "_BLOCK", size)
    x, weight = torch.randn(5, 96).bfloat16(), torch.randn(600, 96).bfloat16()
    bias = torch.randn(600).bfloat16() if biased else None
    product = patches.linear_in_blocks(x, weight, bias)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert product.dtype == torch.bfloat16
    assert torch.allclose(product.double(), exact, rtol=2**-8, atol=1e-5)
