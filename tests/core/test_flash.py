"""Varlen attention, which a GPU computes, compared with masked attention, which a CPU computes."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlora.core import batch
from rlora.core.attention import Layout, Tree, layout_of
from rlora.core.batch import microbatches, sample_of
from rlora.core.flash import Lengths, Segments
from rlora.core.lora import Spec
from rlora.core.policy import Policies
from rlora.records import Group

CPU = torch.device("cpu")
ROWS: dict[str, Lengths] = {
    "a shared prompt": [(5, [3, 4, 2])],
    "several prompts": [(5, [3, 4]), (2, [6]), (7, [1, 1, 1])],
    "one token": [(1, [1])],
    "a text": [(1, [9])],
    "nothing after the prompt": [(4, [0])],
    "empty places": [(4, [0, 3]), (3, [0]), (2, [2, 0])],
    "long and short side by side": [(300, [2, 400]), (1, [1]), (3, [250, 1, 7])],
}


def attended(layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of q, k and v for a loss that depends on all outputs."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = layout.attend(*leaves, 0.3)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_segments_are_what_the_mask_says(lengths: Lengths, heads: tuple[int, int]) -> None:
    tokens = sum(prompt + sum(completions) for prompt, completions in lengths)
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, heads[kind], 8, dtype=torch.float64) for kind in (0, 1, 1))
    masked = attended(Tree.from_lengths(lengths, torch.float64, CPU), q, k, v)
    by_segments = attended(Segments.from_lengths(lengths, CPU), q, k, v)
    for expected, actual in zip(masked, by_segments, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_the_gradients_are_those_of_the_output() -> None:
    lengths = ROWS["empty places"]
    leaves = [torch.randn(14, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: Segments.from_lengths(lengths, CPU).attend(q, k, v, 0.7), leaves)


def test_scores_far_apart_are_no_nan() -> None:
    """A completion that attends only to its prompt, or only to itself: one of the two calls has weight 0."""
    lengths = [(2, [2])]
    for sign in (1.0, -1.0):
        q = torch.full((4, 1, 2), 30.0, dtype=torch.float64)
        k = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None, None].expand(4, 1, 2) * 30 * sign
        v = torch.arange(8, dtype=torch.float64).view(4, 1, 2)
        masked = attended(Tree.from_lengths(lengths, torch.float64, CPU), q, k, v)
        for expected, actual in zip(masked, attended(Segments.from_lengths(lengths, CPU), q, k, v), strict=True):
            assert actual.isfinite().all()
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_both_know_the_longest() -> None:
    for lengths in ROWS.values():
        longest = max(prompt + completion for prompt, completions in lengths for completion in completions)
        assert (
            Segments.from_lengths(lengths, CPU).longest
            == longest
            <= Tree.from_lengths(lengths, torch.float32, CPU).longest
        )


def test_a_gpu_in_16_bits_takes_segments() -> None:
    assert isinstance(layout_of([(2, [3])], torch.bfloat16, CPU), Tree)
    assert isinstance(layout_of([(2, [3])], torch.bfloat16, torch.device("cpu")), Tree)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("rlora.core.flash.send", lambda tensor, to: tensor)
        assert isinstance(layout_of([(2, [3])], torch.bfloat16, torch.device("cuda")), Segments)


def test_a_policy_has_the_same_logprobs_with_both(
    tiny_base: PreTrainedModel, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logprobs of a row of a model, and the gradients of its adapter, in fp64."""
    policies = Policies(tiny_base.double())
    policies.add("run", Spec(2), 0)
    for parameter in policies.parameters_of("run").values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    samples = [[sample_of(group.prompt.token_ids, episode) for episode in group.episodes] for group in groups]
    results = []
    for layout in (Tree.from_lengths, lambda lengths, dtype, device: Segments.from_lengths(lengths, device)):
        monkeypatch.setattr(batch, "layout_of", layout)
        (row,) = microbatches(samples, 100, torch.float64, CPU)
        logprobs = policies.outputs(row, "run", entropies=True).logprobs
        gradients = torch.autograd.grad(logprobs.sum(), policies.parameters_of("run").values())
        results.append([logprobs.detach(), *gradients])
    for masked, segments in zip(*results, strict=True):
        torch.testing.assert_close(segments, masked, rtol=1e-6, atol=1e-6)
