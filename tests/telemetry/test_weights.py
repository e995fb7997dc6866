"""Telemetry of low-rank updates, compared with the matrices themselves and their full SVD."""

import json
import math
from collections.abc import Sequence
from dataclasses import astuple

import pytest
import safetensors.torch
import torch
from conftest import tiny_model
from torch import Tensor

from rlora.core import peft_format
from rlora.core.lora import Bank, Spec, split_experts
from rlora.records import Adapter
from rlora.telemetry.weights import Weights, path_of, rank_used, weights_line

TOLERANCE = 1e-5


def versions(count: int, spec: Spec, moved: float = 0.1, kind: str = "llama") -> tuple[Bank, list[Adapter]]:
    """A bank over a tiny model, and adapters of which each differs from the one before by steps of size `moved`."""
    bank = Bank(tiny_model(kind))
    bank.add("run", spec, seed=1)
    generator, adapters = torch.Generator().manual_seed(2), []
    for number in range(count):
        adapters.append(Adapter("run", number, *peft_format.encode(bank, "run", "base")))
        for parameter in bank.parameters_of("run").values():
            parameter.data += moved * torch.randn(parameter.shape, generator=generator)
    return bank, adapters


def full(bank: Bank, adapter: Adapter) -> dict[str, Tensor]:
    """The update of each matrix, (E, d_out, d_in) in float64."""
    tensors = safetensors.torch.load(adapter.weights)
    updates = {}
    for (name_a, name_b), matrix in peft_format.matrices_by_name(bank.pairs_of("run")).items():
        experts = matrix.shape[0] if len(matrix.shape) == 3 else 1
        a, b = split_experts(tensors[name_a].double(), tensors[name_b].double(), experts)
        updates[matrix.key] = bank.pairs_of("run")[matrix].scale * (b @ a)
    return updates


def cosine(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("spec", [Spec(rank=1), Spec(rank=4, alpha=7.0), Spec(rank=8, rslora=True, targets="mlp")])
@pytest.mark.parametrize("moved", [0.1, 1e-4])
def test_figures_equal_those_of_the_full_matrices(kind: str, spec: Spec, moved: float) -> None:
    bank, (start, first, second, third) = versions(4, spec, moved, kind)
    weights = Weights(bank.base_norms("run"), [start])
    weights.measure(first)
    weights.measure(second)
    total, matrices = weights.measure(third)
    xs, ys, zs = (full(bank, adapter) for adapter in (third, second, first))
    assert matrices.keys() == xs.keys() == weights.base_norms.keys()
    for key, figures in matrices.items():
        x, y, z = xs[key], ys[key], zs[key]
        exact = torch.linalg.svdvals(x).flatten().sort(descending=True).values
        top = float(exact[0])
        assert figures.sigma == pytest.approx(exact[: len(figures.sigma)].tolist(), abs=TOLERANCE * top)
        assert figures.norm == pytest.approx(float(x.norm()), rel=TOLERANCE)
        assert figures.moved == pytest.approx(float((x - y).norm()), rel=TOLERANCE)
        assert figures.cosine_last == pytest.approx(cosine(x - y, y - z), abs=TOLERANCE)
        assert figures.cosine_update == pytest.approx(cosine(x - y, y), abs=TOLERANCE)
    x, y, z = (torch.cat([update.flatten() for update in updates.values()]) for updates in (xs, ys, zs))
    matrices_of = {matrix.key: matrix.weight for matrix in bank.pairs_of("run")}
    base = torch.cat([weight.detach().double().flatten() for weight in matrices_of.values()])
    assert total["weights/norm"] == pytest.approx(float(x.norm()), rel=TOLERANCE)
    assert total["weights/relative"] == pytest.approx(float(x.norm() / base.norm()), rel=TOLERANCE)
    assert total["weights/moved"] == pytest.approx(float((x - y).norm()), rel=TOLERANCE)
    assert total["weights/cosine_last"] == pytest.approx(cosine(x - y, y - z), abs=TOLERANCE)
    assert total["weights/cosine_update"] == pytest.approx(cosine(x - y, y), abs=TOLERANCE)


def test_the_effective_rank_by_hand() -> None:
    assert rank_used((3.0,)) == 1.0
    assert rank_used((2.0, 2.0, 0.0, 0.0)) == pytest.approx(0.5)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rank_used((3.0, 1.0)) == pytest.approx(math.exp(entropy) / 2)
    assert rank_used((0.0, 0.0)) is None


def test_a_policy_that_has_not_moved_has_no_directions() -> None:
    bank, (start, *_) = versions(1, Spec(rank=2))
    total, matrices = Weights(bank.base_norms("run"), [start]).measure(start)
    assert (total["weights/norm"], total["weights/moved"], total["weights/cosine_last"]) == (0.0, 0.0, None)
    assert all(figures.sigma == (0.0, 0.0) for figures in matrices.values())


def test_a_resumed_run_continues_with_the_same_figures() -> None:
    bank, adapters = versions(4, Spec(rank=2))
    norms = bank.base_norms("run")

    def measured(known: Sequence[Adapter], following: Sequence[Adapter]) -> object:
        weights = Weights(norms, known)
        return [weights.measure(adapter) for adapter in following][-1]

    assert measured(adapters[1:3], adapters[3:]) == measured(adapters[:1], adapters[1:])


def test_full_finetuning_has_no_figures() -> None:
    weights = Weights({}, [adapter := Adapter("run", 0, b"{}", b"", full_weights=True)])
    assert (weights.measure(adapter), weights.base_norms) == (({}, {}), {})
    assert weights_line(0, {}) == ""


def test_a_line_has_a_figure_per_matrix() -> None:
    bank, adapters = versions(2, Spec(rank=2))
    weights = Weights(bank.base_norms("run"), adapters[:1])
    _, matrices = weights.measure(adapters[1])
    line = json.loads(weights_line(3, matrices))
    assert line["step"] == 3
    assert list(weights.base_norms) == list(matrices)
    first = astuple(next(iter(matrices.values())))
    assert line["norm"][0] == pytest.approx(first[0], rel=1e-4)
    assert line["sigma"][0] == pytest.approx(first[4], rel=1e-4)
    assert {len(values) for name, values in line.items() if name != "step"} == {len(matrices)}
    assert line["cosine_last"][0] is None


def test_a_path_equals_that_of_the_full_matrices() -> None:
    bank, adapters = versions(5, Spec(rank=2))
    path = path_of(adapters)
    points = torch.stack([torch.cat([update.flatten() for update in full(bank, item).values()]) for item in adapters])
    changes = points.diff(dim=0)
    _, sigma, directions = torch.linalg.svd(changes, full_matrices=False)
    assert path.explained == pytest.approx((sigma**2 / (sigma**2).sum()).tolist(), abs=TOLERANCE)
    for index in (0, 1):
        exact = (points - points[0]) @ directions[index]
        exact = exact * (1 if float(exact[-1] * path.coordinates[-1][index]) > 0 else -1)
        size = float(exact.abs().max())
        assert [point[index] for point in path.coordinates] == pytest.approx(exact.tolist(), abs=TOLERANCE * size)
    cosines = [abs(cosine(change, directions[0])) for change in changes]
    assert [abs(value or 0.0) for value in path.cosines] == pytest.approx(cosines, abs=TOLERANCE)
    length = changes.norm(dim=1).sum()
    assert path.straightness == pytest.approx(float((points[-1] - points[0]).norm() / length), rel=TOLERANCE)


def test_a_straight_path_has_one_direction() -> None:
    bank, adapters = versions(1, Spec(rank=1))
    for number in (1, 2, 3):
        for matrix, pair in bank.pairs_of("run").items():
            pair.b.data[:] = number * torch.arange(float(matrix.shape[-2]))[:, None]
        adapters.append(Adapter("run", number, *peft_format.encode(bank, "run", "base")))
    path = path_of(adapters)
    assert path.explained == pytest.approx([1.0, 0.0, 0.0], abs=1e-9)
    assert path.straightness == pytest.approx(1.0)
    assert path.cosines == pytest.approx([1.0] * 3)


def test_a_policy_that_stands_still_has_no_direction() -> None:
    _, (start,) = versions(1, Spec(rank=1))
    path = path_of([start, start, start])
    assert (path.explained, path.straightness, path.cosines) == ((), None, (None, None))
