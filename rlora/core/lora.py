"""Low-rank layers over every weight matrix of a frozen base: a bank of K adapters, of which a pass is under one."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlora.records import RloraError

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


@dataclass
class Serving:
    """The name of the adapter that all layers of a bank apply now; None is the base."""

    adapter: str | None = None


@dataclass(eq=False)
class Pair:
    """A and B of one adapter over one matrix: fp32 masters in PEFT's layout."""

    a: nn.Parameter  # (E r, d_in), expert after expert; E is 1 without experts
    b: nn.Parameter  # (d_out, r E), an expert's columns E apart
    scale: float


class Factors:
    """A and B of each adapter over one matrix, or over each expert's, by the adapters' names."""

    def __init__(self, matrix: Matrix, serving: Serving) -> None:
        self.matrix, self.serving = matrix, serving
        self.experts = matrix.shape[0] if len(matrix.shape) == 3 else None
        self.pairs: dict[str, Pair] = {}

    def add(self, name: str, spec: Spec, generator: torch.Generator) -> None:
        """A new adapter, whose A is drawn by `generator`; B is 0, so its policy is the base."""
        *_, d_out, d_in = self.matrix.shape
        rank, E, device = spec.rank_of(self.matrix), self.experts or 1, self.matrix.weight.device
        a = _initial(spec.init, E, rank, d_in, generator).to(device)
        b = torch.zeros(d_out, rank * E, device=device)
        self.pairs[name] = Pair(nn.Parameter(a), nn.Parameter(b), spec.scale(self.matrix.key, rank))

    def served(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A (r, d_in) and B (d_out, r) of the adapter that is served; with experts, A and B of each, E first.

        As the engine serves them: rounded to the dtype of the activations, with the scale folded into B; gradients
        pass through the rounding to the masters. None where no adapter is served, or it leaves this matrix alone.
        """
        pair = self.pairs.get(self.serving.adapter) if self.serving.adapter else None
        if pair is None:
            return None
        a, b = pair.a.to(dtype), pair.b.to(dtype) * pair.scale
        return of_each_expert(a, b, self.experts) if self.experts else (a, b)


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

    def __init__(self, base: nn.Linear, factors: Factors) -> None:
        super().__init__()
        self.base, self.factors = base, factors

    def forward(self, x: Tensor) -> Tensor:
        served = self.factors.served(x.dtype)
        if served is None:
            return self.base(x)  # type: ignore[no-any-return]
        if type(self.base) is not nn.Linear:  # quantised: W x and its gradient are its own affair
            return thin_product(self.base(x), x, *served)
        return low_rank(x, self.base.weight, self.base.bias, *served)


class LoRAExperts(nn.Module):
    """Experts whose weights are fused, `gate_up_proj` (E, 2 I, H) and `down_proj` (E, H, I), each with its adapter."""

    def __init__(self, base: nn.Module, gate_up: Factors, down: Factors) -> None:
        super().__init__()
        self.base, self.gate_up, self.down = base, gate_up, down

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x (tokens, H); the experts of each token and their weights (tokens, top k) -> (tokens, H)."""
        served_gate_up, served_down = self.gate_up.served(x.dtype), self.down.served(x.dtype)
        if served_gate_up is None and served_down is None:
            return self.base(x, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        gate_up, down = _product(self.base.gate_up_proj, served_gate_up), _product(self.base.down_proj, served_down)
        y = torch.zeros_like(x)
        for expert, tokens, choice in _routes(top_k_index):
            h: Tensor = self.base._apply_gate(gate_up(x[tokens], expert))  # type: ignore[operator]
            y.index_add_(0, tokens, (down(h, expert) * top_k_weights[tokens, choice, None]).to(y.dtype))
        return y


def _routes(top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The experts that are met, the tokens that meet each, and as which of their choices: (rows,) int64 each.

    On the meta device, where only the memory is asked for, as many rows in as few experts as can be.
    """
    if top_k_index.is_meta:
        tokens = torch.arange(len(top_k_index), device="meta")
        yield from ((expert, tokens, tokens) for expert in range(top_k_index.shape[1]))
        return
    for expert in top_k_index.unique().tolist():
        yield expert, *torch.where(top_k_index == expert)


def _product(weight: Any, served: tuple[Tensor, Tensor] | None) -> Callable[[Tensor, int], Tensor]:
    """(rows, expert) -> what that expert's matrix makes of the rows, with its adapter."""
    if served is None:
        return lambda h, expert: linear(h, weight[expert])
    a, b = (each.unbind() for each in served)
    return lambda h, expert: low_rank(h, weight[expert], None, a[expert], b[expert])


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """y = W x + bias + b a x: x (..., d_in), W (d_out, d_in), a (r, d_in), b (d_out, r) -> (..., d_out)"""
    return _LowRank.apply(x, weight, bias, a, b)  # type: ignore[no-any-return, no-untyped-call]


def thin_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + b a x, y (..., d_out), the rest as in `low_rank`: for a W that is at hand as a function alone."""
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2) @ a.mT, b.mT).view_as(y)


class _LowRank(torch.autograd.Function):
    """In place: the thin product is added to W x as it is made, and so is its part of x's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        h = flat @ a.mT  # (tokens, r)
        ctx.save_for_backward(flat, h, weight, a, b)
        y = linear(flat, weight, bias).addmm_(h, b.mT)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight, a, b = ctx.saved_tensors
        g = grad.flatten(0, -2)
        g_h = g @ b
        g_x = (g @ weight).addmm_(g_h, a).view(*grad.shape[:-1], a.shape[1]) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_h.mT @ x, g.mT @ h


class Bank:
    """Adapters over the weight matrices of `model`, which is frozen and changed in place.

    Each adapter follows from its own spec and seed: no other has a part in it, nor in a forward pass under it. `over`
    are the matrices that adapters may be over, by default all.
    """

    def __init__(self, model: nn.Module, over: Iterable[Matrix] | None = None) -> None:
        self.model = model.requires_grad_(requires_grad=False)
        self.specs: dict[str, Spec] = {}
        self.serves = Serving()
        self.factors = {matrix: Factors(matrix, self.serves) for matrix in (matrices(model) if over is None else over)}
        for place, found in groupby(self.factors, lambda matrix: matrix.place):
            factors = [self.factors[matrix] for matrix in found]
            module = model.get_submodule(place)
            layer = LoRALinear(module, *factors) if isinstance(module, nn.Linear) else LoRAExperts(module, *factors)
            parent, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)

    def add(self, name: str, spec: Spec, seed: int = 0) -> None:
        """A new adapter, over the matrices that `spec` names. Raises RloraError where it can be over none of them."""
        over = [matrix for matrix in self.factors if spec.rank_of(matrix)]
        kind = type(self.model).__name__
        if not over:
            wanted = spec.targets if isinstance(spec.targets, str) else sorted(spec.targets)[:3]
            raise RloraError(
                f"model: none of the {len(self.factors)} weight matrices (torch.nn.Linear and experts) of {kind} is "
                f"to be adapted ({wanted}); use another model, or an adapter made for it"
            )
        for matrix in over:
            if matrix.kind == "head":
                _refuse_tied(self.model, matrix)
            elif len(matrix.shape) == 3:
                _refuse_other_layouts(matrix)
        generator = torch.Generator().manual_seed(seed)
        for matrix in over:
            self.factors[matrix].add(name, spec, generator)
        self.specs[name] = spec

    def remove(self, name: str) -> None:
        for factors in self.factors.values():
            factors.pairs.pop(name, None)
        self.specs.pop(name, None)

    @contextmanager
    def serving(self, name: str | None) -> Iterator[None]:
        """Within it, forward passes are under that adapter; under the base with None."""
        before, self.serves.adapter = self.serves.adapter, name
        try:
            yield
        finally:
            self.serves.adapter = before

    def over(self, name: str) -> dict[Matrix, Pair]:
        """The matrices that one adapter is over, and its factors."""
        return {matrix: of.pairs[name] for matrix, of in self.factors.items() if name in of.pairs}

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Its masters, by matrix and factor."""
        pairs = [(matrix.key, pair) for matrix, pair in self.over(name).items()]
        return {f"{key}.{factor}": p for key, pair in pairs for factor, p in (("lora_A", pair.a), ("lora_B", pair.b))}


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


def _refuse_tied(model: Any, head: Matrix) -> None:
    if model.get_input_embeddings().weight is head.module.weight:
        raise RloraError(
            f"learner.head = true: the output head of {type(model).__name__} is its embedding matrix too, and an "
            "engine that holds one matrix for both can't adapt one of them; leave learner.head off"
        )


def _refuse_other_layouts(matrix: Matrix) -> None:
    experts = matrix.module
    odd = [trait for trait in ("is_transposed", "has_bias") if getattr(experts, trait, False)]
    if odd or not hasattr(experts, "_apply_gate"):
        raise RloraError(
            f"model: the experts in {matrix.place} ({type(experts).__name__}: {', '.join(odd) or 'without a gate'}) "
            'can\'t be adapted yet; use learner.targets = "attention"'
        )
