"""Our low-rank product in vLLM against plain loops."""

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # importing vLLM warns


@pytest.mark.parametrize("ids", [(7, 7, 7, 7), (7, 0, 9, 7), (0, 0, 0, 0)])
def test_each_row_gets_its_own_adapter_or_none(ids: tuple[int, ...]) -> None:
    from vllm.lora.layers import LoRAMapping

    from rlora.thin_products import ThinProducts

    torch.manual_seed(0)
    slot_of = {7: 0, 9: 1}
    widths, rank, d_in = (4, 2), 3, 5
    a = tuple(torch.randn(2, 1, rank, d_in) for _ in widths)
    b = tuple(torch.randn(2, 1, width, rank) for width in widths)
    x, y = torch.randn(4, d_in), torch.randn(4, sum(widths))
    expected = y.clone()
    for row, adapter in enumerate(ids):
        if adapter:
            parts = [
                b_of[slot_of[adapter], 0] @ a_of[slot_of[adapter], 0] @ x[row] for a_of, b_of in zip(a, b, strict=True)
            ]
            expected[row] += torch.cat(parts)
    products = ThinProducts(16, 4, torch.device("cpu"))
    products.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [7, 9], 3, 100)
    got = y.clone()
    products.add_lora_linear(got, x, a, b, 1.0, widths)
    torch.testing.assert_close(got, expected)
    without = [row for row, adapter in enumerate(ids) if not adapter]
    assert got[without].equal(y[without])
