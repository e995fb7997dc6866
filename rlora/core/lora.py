"""Low-rank layers over every weight matrix of a frozen base: a bank of K adapters, all in one forward pass."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlora.records import OFF, RloraError

Init = Literal["uniform", "orthonormal"]
_Number = TypeVar("_Number", int, float)

_ROUTERS = {"gate", "router", "shared_expert_gate"}  # linear layers that choose or weigh experts
_ATTENTION = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention)\.")


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix of the base, or one of each expert, fused."""

    key: str  # the name of its module, or of the experts' parameter
    place: str  # of its module
    kind: str  # attention, mlp or head
    shape: tuple[int, ...]  # (d_out, d_in) or (E, d_out, d_in), however it is held
    module: nn.Module
    parameter: str = "weight"  # its name in the module
    active: int = 1  # of the E experts, those that a token meets

    @property
    def weight(self) -> Tensor:
        """As its module holds it now: a sharded or quantised base has it in another form."""
        return self.module.get_parameter(self.parameter)


@dataclass(frozen=True)
class Spec:
    """One adapter: its rank, its scale, and the matrices it is over."""

    rank: int = 1
    alpha: float = 32.0
    rslora: bool = False  # scale alpha / sqrt(rank), which grows with the rank (arXiv:2312.03732), for alpha / rank
    init: Init = "uniform"
    targets: str | frozenset[str] = "all"  # all, attention or mlp; or matrices by their keys
    head: bool = False  # the output head too
    shares_rank: bool = True  # among the experts that a token meets; PEFT's own adapters have the same rank everywhere
    # of single matrices, by a regular expression that the end of their keys matches
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, matrix: Matrix) -> int:
        """0 where it leaves the matrix alone.

        Over an expert's, ranks that are shared are divided by the experts that a token meets, 1 at least ("LoRA
        Without Regret", Thinking Machines 2025): a token meets as much of the adapter there as elsewhere.
        """
        if isinstance(self.targets, frozenset):
            wanted = matrix.key in self.targets
        else:
            wanted = self.head if matrix.kind == "head" else self.targets in ("all", matrix.kind)
        rank = max(1, self.rank // matrix.active) if self.shares_rank else self.rank
        return _by_pattern(self.rank_pattern, matrix.key, rank) if wanted else 0

    def scale(self, key: str, rank: int) -> float:
        """Of the matrix with that key, over which the adapter has that rank."""
        return _by_pattern(self.alpha_pattern, key, self.alpha) / max(1, math.sqrt(rank) if self.rslora else rank)


def _by_pattern(pattern: Mapping[str, _Number], key: str, default: _Number) -> _Number:
    return next((value for ending, value in pattern.items() if re.match(rf"(.*\.)?({ending})$", key)), default)


class Route:
    """Which adapter each token of a forward pass has: all one, or each its own (int64, in order); `OFF` is none."""

    def __init__(self, adapters: int | Tensor) -> None:
        self.adapters = adapters
        present = [adapters] if isinstance(adapters, int) else adapters.unique().tolist()
        self.mixed = len(present) > 1
        self.present: list[int] = [adapter for adapter in present if adapter != OFF]  # no other is computed
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def mask(self, ranks: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """(tokens, R): 1 where a column of the stacked A x is of the token's adapter. None where all tokens agree."""
        if not self.mixed or isinstance(self.adapters, int):
            return None
        if ranks not in self._masks:
            columns = [adapter for adapter, rank in zip(self.present, ranks, strict=True) for _ in range(rank)]
            of_column = torch.tensor(columns, device=self.adapters.device)
            self._masks[ranks] = (self.adapters.flatten()[:, None] == of_column).to(dtype)
        return self._masks[ranks]


@dataclass
class Routing:
    """The route that all layers of a bank follow now."""

    route: Route = field(default_factory=lambda: Route(0))


class Factors(nn.Module):
    """A and B of K adapters over one matrix, or over each expert's: fp32 masters in PEFT's layout.

    Of adapter k, A (E r, d_in), expert after expert, and B (d_out, r E), an expert's columns E apart; E is 1 without
    experts.
    """

    def __init__(self, matrix: Matrix, specs: Sequence[Spec], generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        *fused, d_out, d_in = matrix.shape
        device = matrix.weight.device
        self.experts = fused[0] if fused else None
        E = self.experts or 1
        self.ranks = [spec.rank_of(matrix) for spec in specs]
        self.scales = [spec.scale(matrix.key, rank) for spec, rank in zip(specs, self.ranks, strict=True)]
        each = zip(specs, self.ranks, generators, strict=True)
        a = [_initial(spec.init, E, rank, d_in, generator) for spec, rank, generator in each]
        self.lora_A = nn.ParameterList(nn.Parameter(a_k.to(device)) for a_k in a)
        self.lora_B = nn.ParameterList(  # 0: the policy is the base
            nn.Parameter(torch.zeros(d_out, rank * E, device=device)) for rank in self.ranks
        )

    def stacked(self, route: Route, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A (R, d_in), B (d_out, R) and the mask of the adapters in the batch; with experts, A and B of each, E first.

        As the engine serves them: rounded to the dtype of the activations, with the scale folded into B; gradients
        pass through the rounding to the masters. None where no adapter is over this matrix.
        """
        ranks = tuple(self.ranks[k] for k in route.present)
        if not any(ranks):
            return None
        a = [self.lora_A[k].to(dtype) for k in route.present]
        b = [self.lora_B[k].to(dtype) * self.scales[k] for k in route.present]
        if self.experts:
            pairs = [of_each_expert(a_k, b_k, self.experts) for a_k, b_k in zip(a, b, strict=True)]
            a, b = [a_k for a_k, _ in pairs], [b_k for _, b_k in pairs]
        mask = route.mask(ranks, dtype)
        return (a[0], b[0], mask) if len(a) == 1 else (torch.cat(a, -2), torch.cat(b, -1), mask)


def of_each_expert(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A (E r, d_in) and B (d_out, r E) in PEFT's layout -> A (E, r, d_in) and B (E, d_out, r), views."""
    return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)


def _initial(init: Init, experts: int, rank: int, d_in: int, generator: torch.Generator) -> Tensor:
    """A (E r, d_in). With B = 0 the policy is the base, whatever A is.

    PiSSA's start (arXiv:2404.02948), the base's own singular vectors, is not among them: there B A != 0 is taken out of
    the base, and the adapter without that other base is not the policy.
    """
    if init == "orthonormal":
        a = torch.empty(experts, d_in, rank).normal_(generator=generator)
        return torch.linalg.qr(a).Q.mT.reshape(experts * rank, d_in)  # type: ignore[no-any-return]
    bound = 1 / math.sqrt(d_in)
    return torch.empty(experts * rank, d_in).uniform_(-bound, bound, generator=generator)


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, with W frozen (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

    def __init__(self, base: nn.Linear, routing: Routing, factors: Factors) -> None:
        super().__init__()
        self.base, self.factors, self.routing = base, factors, routing

    def forward(self, x: Tensor) -> Tensor:
        stacked = self.factors.stacked(self.routing.route, x.dtype)
        if stacked is None:
            return self.base(x)  # type: ignore[no-any-return]
        if type(self.base) is not nn.Linear:  # quantised: W x and its gradient are its own affair
            return thin_product(self.base(x), x, *stacked)
        return low_rank(x, self.base.weight, self.base.bias, *stacked)


class LoRAExperts(nn.Module):
    """Experts whose weights are fused, `gate_up_proj` (E, 2 I, H) and `down_proj` (E, H, I), each with its adapter."""

    def __init__(self, base: nn.Module, routing: Routing, gate_up: Factors, down: Factors) -> None:
        super().__init__()
        self.base, self.gate_up, self.down, self.routing = base, gate_up, down, routing

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x (tokens, H); the experts of each token and their weights (tokens, top k) -> (tokens, H)."""
        gate_up = self._product(self.base.gate_up_proj, self.gate_up, x.dtype)
        down = self._product(self.base.down_proj, self.down, x.dtype)
        y = torch.zeros_like(x)
        for expert in top_k_index.unique().tolist():
            tokens, choice = torch.where(top_k_index == expert)
            h: Tensor = self.base._apply_gate(gate_up(x[tokens], tokens, expert))  # type: ignore[operator]
            y.index_add_(0, tokens, (down(h, tokens, expert) * top_k_weights[tokens, choice, None]).to(y.dtype))
        return y

    def _product(self, weight: Any, factors: Factors, dtype: torch.dtype) -> Callable[[Tensor, Tensor, int], Tensor]:
        """(rows, their tokens, expert) -> what that expert's matrix makes of the rows, with its adapter."""
        stacked = factors.stacked(self.routing.route, dtype)
        if stacked is None:
            return lambda h, _, expert: linear(h, weight[expert])
        a, b = (each.unbind() for each in stacked[:2])
        mask = stacked[2]
        return lambda h, tokens, expert: low_rank(
            h, weight[expert], None, a[expert], b[expert], None if mask is None else mask[tokens]
        )


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """y = W x + bias + b (mask * (a x)): x (..., d_in), W (d_out, d_in), a (R, d_in), b (d_out, R) -> (..., d_out)

    `mask` (tokens, R) chooses each token's adapter among those stacked; a token that has none gets W x, exactly.
    """
    return _LowRank.apply(x, weight, bias, a, b, mask)  # type: ignore[no-any-return, no-untyped-call]


def thin_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """y + b (mask * (a x)), y (..., d_out), the rest as in `low_rank`: for a W that is at hand as a function alone."""
    h = x.flatten(0, -2) @ a.mT  # (tokens, R)
    if mask is not None:
        h = h * mask
    return torch.addmm(y.flatten(0, -2), h, b.mT).view_as(y)


class _LowRank(torch.autograd.Function):
    """In place: the thin product is added to W x as it is made, and so is its part of x's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor | None
    ) -> Tensor:
        flat = x.flatten(0, -2)
        h = flat @ a.mT  # (tokens, R)
        if mask is not None:
            h *= mask
        ctx.save_for_backward(flat, h, weight, a, b, mask)
        y = linear(flat, weight, bias).addmm_(h, b.mT)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight, a, b, mask = ctx.saved_tensors
        g = grad.flatten(0, -2)
        g_h = g @ b
        if mask is not None:
            g_h *= mask
        g_x = (g @ weight).addmm_(g_h, a).view(*grad.shape[:-1], a.shape[1]) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_h.mT @ x, g.mT @ h, None


class Bank:
    """K adapters over the weight matrices of `model`, which is frozen and changed in place.

    `factors` holds them by matrix. Without any, the model's own weights are left to be trained. Raises RloraError where
    there is nothing to adapt.
    """

    def __init__(self, model: nn.Module, specs: Sequence[Spec], seed: int = 0) -> None:
        model.requires_grad_(not specs)
        self.specs = tuple(specs)
        self.routing = Routing()
        self.factors: dict[Matrix, Factors] = {}
        self.matrices = list(matrices(model))
        generators = [torch.Generator().manual_seed(seed + k) for k in range(len(specs))]  # A does not depend on others
        for place, found in groupby(self.matrices, lambda matrix: matrix.place):
            factors = {matrix: Factors(matrix, specs, generators) for matrix in found}
            if any(any(each.ranks) for each in factors.values()):
                self.factors |= factors
                parent, _, leaf = place.rpartition(".")
                module = model.get_submodule(place)
                if isinstance(module, nn.Linear):
                    if any(matrix.kind == "head" for matrix in factors):
                        _refuse_tied(model, module)
                    layer: nn.Module = LoRALinear(module, self.routing, *factors.values())
                else:
                    _refuse_other_layouts(place, module)
                    layer = LoRAExperts(module, self.routing, *factors.values())
                setattr(model.get_submodule(parent), leaf, layer)
        if specs and not self.factors:
            wanted = [spec.targets if isinstance(spec.targets, str) else sorted(spec.targets)[:3] for spec in specs]
            raise RloraError(
                f"model: none of the {len(self.matrices)} weight matrices (torch.nn.Linear and experts) of "
                f"{type(model).__name__} is to be adapted ({wanted}); use another model, or an adapter made for it"
            )

    @contextmanager
    def serving(self, route: Route) -> Iterator[None]:
        """Within it, tokens have the adapters that `route` says."""
        before, self.routing.route = self.routing.route, route
        try:
            yield
        finally:
            self.routing.route = before

    def over(self, adapter: int) -> list[Matrix]:
        """The matrices that one adapter is over."""
        return [matrix for matrix, factors in self.factors.items() if factors.ranks[adapter]]


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """All that can be adapted: PEFT's all-linear, fused experts, and the head. Routers are left alone."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if name.rpartition(".")[2] not in _ROUTERS:
                kind = "head" if module is head else "attention" if _ATTENTION.search(name) else "mlp"
                yield Matrix(name, name, kind, (module.out_features, module.in_features), module)
        elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) and isinstance(model, PreTrainedModel):
            active = int(model.config.get_text_config().num_experts_per_tok)
            for part in ("gate_up_proj", "down_proj"):
                shape = tuple(module.get_parameter(part).shape)
                yield Matrix(f"{name}.{part}", name, "mlp", shape, module, part, active)


def _refuse_tied(model: Any, head: nn.Linear) -> None:
    if model.get_input_embeddings().weight is head.weight:
        raise RloraError(
            f"learner.head = true: the output head of {type(model).__name__} is its embedding matrix too, and an "
            "engine that holds one matrix for both can't adapt one of them; leave learner.head off"
        )


def _refuse_other_layouts(place: str, experts: nn.Module) -> None:
    odd = [trait for trait in ("is_transposed", "has_bias") if getattr(experts, trait, False)]
    if odd or not hasattr(experts, "_apply_gate"):
        raise RloraError(
            f"model: the experts in {place} ({type(experts).__name__}: {', '.join(odd) or 'without a gate'}) can't be "
            'adapted yet; use learner.targets = "attention"'
        )
