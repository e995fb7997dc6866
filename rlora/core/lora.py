"""Low-rank layers over the weight matrices of a frozen base: a bank of K adapters, one of which each pass applies."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlora.device import linear, wide
from rlora.records import RloraError

Init = Literal["uniform", "orthonormal"]
_Number = TypeVar("_Number", int, float)

_ROUTERS = {"gate", "router", "shared_expert_gate"}  # linear layers that choose or weight experts
_ATTENTION = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention)\.")


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix of the base, or the fused matrices of E experts."""

    key: str  # full name of the module, or of the experts' parameter
    module_name: str  # full name of the module
    kind: str  # attention, mlp or head
    shape: tuple[int, ...]  # (d_out, d_in) or (E, d_out, d_in), even if the weight is sharded or quantised
    module: nn.Module
    parameter: str = "weight"  # the parameter's name in the module
    active: int = 1  # experts per token

    @property
    def weight(self) -> Tensor:
        """The module's current parameter; its shape differs from `shape` in a sharded or quantised base."""
        return self.module.get_parameter(self.parameter)


@dataclass(frozen=True)
class Spec:
    """An adapter's rank, scale and target matrices."""

    rank: int = 1
    alpha: float = 32.0
    rslora: bool = False  # scale by alpha / sqrt(rank) (arXiv:2312.03732) instead of alpha / rank
    init: Init = "uniform"
    targets: str | frozenset[str] = "all"  # all, attention or mlp; or the keys of matrices
    head: bool = False  # also adapt the output head
    shares_rank: bool = True  # divide the rank among a token's active experts; adapters that PEFT made do not
    # Rank and alpha of single matrices, by a regular expression that must match the end of the key.
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, matrix: Matrix) -> int:
        """Return the adapter's rank for a matrix; 0 if the matrix is not adapted.

        With `shares_rank` an expert's rank is `rank` divided by the experts per token, at least 1 ("LoRA Without
        Regret", Thinking Machines 2025), so that each token uses as many adapter parameters there as elsewhere.
        """
        if isinstance(self.targets, frozenset):
            is_target = matrix.key in self.targets
        else:
            is_target = self.head if matrix.kind == "head" else self.targets in ("all", matrix.kind)
        rank = max(1, self.rank // matrix.active) if self.shares_rank else self.rank
        return self.rank_at(matrix.key, rank) if is_target else 0

    def rank_at(self, key: str, default: int) -> int:
        """Return the rank that `rank_pattern` sets for the matrix `key`, else `default`."""
        return _match(self.rank_pattern, key, default)

    def scale(self, key: str, rank: int) -> float:
        """Return the scale of B A for the matrix `key`, given the adapter's rank for this matrix."""
        return _match(self.alpha_pattern, key, self.alpha) / max(1, math.sqrt(rank) if self.rslora else rank)


def _match(pattern: Mapping[str, _Number], key: str, default: _Number) -> _Number:
    return next((value for ending, value in pattern.items() if re.match(rf"(.*\.)?({ending})$", key)), default)


@dataclass
class Serving:
    """The name of the adapter that all layers of a bank apply; with None they compute the base alone."""

    adapter: str | None = None


@dataclass(eq=False)
class Pair:
    """A and B of one adapter for one matrix: fp32 master weights in PEFT's layout."""

    a: nn.Parameter  # (E r, d_in), rows grouped by expert; E is 1 without experts
    b: nn.Parameter  # (d_out, r E), columns interleaved by expert: those of one expert are E apart
    scale: float


class Factors:
    """A and B of every adapter, by its name, for one matrix or for the fused matrices of experts."""

    def __init__(self, matrix: Matrix, serving: Serving) -> None:
        self.matrix, self.serving = matrix, serving
        self.experts = matrix.shape[0] if len(matrix.shape) == 3 else None
        self.pairs: dict[str, Pair] = {}

    def add(self, name: str, spec: Spec, generator: torch.Generator) -> None:
        """Add an adapter. A is drawn from `generator`; B is 0, so the policy starts as the base."""
        *_, d_out, d_in = self.matrix.shape
        rank, E, device = spec.rank_of(self.matrix), self.experts or 1, self.matrix.weight.device
        a = _initial(spec.init, E, rank, d_in, generator).to(device)
        b = torch.zeros(d_out, rank * E, device=device)
        self.pairs[name] = Pair(nn.Parameter(a), nn.Parameter(b), spec.scale(self.matrix.key, rank))

    def served(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return A (r, d_in) and B (d_out, r) of the served adapter; with experts (E, r, d_in) and (E, d_out, r).

        A and B are as in the engine: rounded to `dtype`, that of the activations, with the scale folded into B.
        Gradients reach the fp32 master weights. None if no adapter is served or this matrix is not adapted.
        """
        pair = self.pairs.get(self.serving.adapter) if self.serving.adapter else None
        if pair is None:
            return None
        a, b = pair.a.to(dtype), pair.b.to(dtype) * pair.scale
        return split_experts(a, b, self.experts) if self.experts else (a, b)


def split_experts(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return views by expert: A (E r, d_in) and B (d_out, r E) in PEFT's layout -> A (E, r, d_in), B (E, d_out, r)."""
    return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)


def _initial(init: Init, experts: int, rank: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Draw the initial A, (E r, d_in).

    PiSSA (arXiv:2404.02948), which starts from the base's singular vectors, is not offered: it subtracts its initial
    B A from the base, so the adapter would be of no use with the original base.
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
        if type(self.base) is not nn.Linear:  # quantised: the layer computes W x and its gradient
            y: Tensor = self.base(x)
            return y if served is None else thin_product(y, x, *served)
        if served is None:
            return linear(x, self.base.weight, self.base.bias)
        return low_rank(x, self.base.weight, self.base.bias, *served)


class LoRAExperts(nn.Module):
    """Experts with fused weights `gate_up_proj` (E, 2 I, H) and `down_proj` (E, H, I), and adapters for both."""

    def __init__(self, base: nn.Module, gate_up_factors: Factors, down_factors: Factors) -> None:
        super().__init__()
        self.base, self.gate_up_factors, self.down_factors = base, gate_up_factors, down_factors

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the layer. x (tokens, H), each token's experts and their weights (tokens, top k) -> (tokens, H)"""
        served_gate_up, served_down = self.gate_up_factors.served(x.dtype), self.down_factors.served(x.dtype)
        if served_gate_up is None and served_down is None:
            return self.base(x, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        gate_up_proj = _product(self.base.gate_up_proj, served_gate_up)
        down_proj = _product(self.base.down_proj, served_down)
        y = torch.zeros_like(x)
        for expert, tokens, choice in _routes(top_k_index):
            h: Tensor = self.base._apply_gate(gate_up_proj(x[tokens], expert))  # type: ignore[operator]
            y.index_add_(0, tokens, (down_proj(h, expert) * top_k_weights[tokens, choice, None]).to(y.dtype))
        return y


def _routes(top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for each used expert the index, its tokens, and the columns of `top_k_index` that chose it, (rows,) int64.

    The meta device, which only counts memory, gets the worst case: all rows in as few experts as possible.
    """
    if top_k_index.is_meta:
        tokens = torch.arange(len(top_k_index), device="meta")
        yield from ((expert, tokens, tokens) for expert in range(top_k_index.shape[1]))
        return
    for expert in top_k_index.unique().tolist():
        yield expert, *torch.where(top_k_index == expert)


def _product(weight: Any, served: tuple[Tensor, Tensor] | None) -> Callable[[Tensor, int], Tensor]:
    """Return a function (rows, expert) -> the expert's matrix, with its adapter, times the rows."""
    if served is None:
        return lambda h, expert: linear(h, weight[expert])
    a, b = (factor.unbind() for factor in served)
    return lambda h, expert: low_rank(h, weight[expert], None, a[expert], b[expert])


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Compute W x + bias + b a x: x (..., d_in), W (d_out, d_in), a (r, d_in), b (d_out, r) -> (..., d_out)"""
    return _LowRank.apply(x, weight, bias, a, b)  # type: ignore[no-any-return, no-untyped-call]


def thin_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute y + b a x with y = W x (..., d_out), for base layers that only expose W x; shapes as in `low_rank`."""
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2) @ a.mT, b.mT).view_as(y)


class _LowRank(torch.autograd.Function):
    """Adds the low-rank product to W x in place, and its part of x's gradient likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        flat, wide_weight, wide_bias, wide_a = wide(x.flatten(0, -2), weight, bias, a)
        h = (flat @ wide_a.mT).to(x.dtype)  # (tokens, r)
        ctx.save_for_backward(x, h, weight, a, b)
        y, wide_h, wide_b = wide(linear(flat, wide_weight, wide_bias).to(x.dtype), h, b)  # rounded as in the engine
        return y.addmm_(wide_h, wide_b.mT).to(x.dtype).view(*x.shape[:-1], len(weight))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        g, flat, h, weight, a, b = wide(grad.flatten(0, -2), x.flatten(0, -2), *factors)
        g_h = g @ b
        g_x = (g @ weight).addmm_(g_h, a).to(x.dtype).view_as(x) if ctx.needs_input_grad[0] else None
        return g_x, None, None, (g_h.mT @ flat).to(x.dtype), (g.mT @ h).to(x.dtype)


class Bank:
    """Adapters over the weight matrices of `model`, which is frozen and changed in place.

    An adapter depends only on its spec and seed, and a forward pass only on the served adapter: adapters never affect
    each other. `targets` are the matrices that adapters may target, by default those of `matrices(model)`.
    """

    def __init__(self, model: nn.Module, targets: Iterable[Matrix] | None = None) -> None:
        self.model = model.requires_grad_(requires_grad=False)
        self.specs: dict[str, Spec] = {}
        self.serves = Serving()
        targets = matrices(model) if targets is None else targets
        self.factors = {matrix: Factors(matrix, self.serves) for matrix in targets}
        for name, members in groupby(self.factors, lambda matrix: matrix.module_name):
            factors = [self.factors[matrix] for matrix in members]
            module = model.get_submodule(name)
            layer = LoRALinear(module, *factors) if isinstance(module, nn.Linear) else LoRAExperts(module, *factors)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)

    def add(self, name: str, spec: Spec, seed: int = 0) -> None:
        """Add an adapter for the matrices that `spec` targets. Raises RloraError, changing nothing, if the model has no
        such matrix, or if one of these matrices is not supported."""
        targets = [matrix for matrix in self.factors if spec.rank_of(matrix)]
        kind = type(self.model).__name__
        if not targets:
            wanted = spec.targets if isinstance(spec.targets, str) else sorted(spec.targets)[:3]
            raise RloraError(
                f"model: none of the {len(self.factors)} weight matrices (torch.nn.Linear and experts) of {kind} is a "
                f"target of the adapter ({wanted}); use a different model, or an adapter made for this model"
            )
        for matrix in targets:
            if matrix.kind == "head":
                _check_untied(self.model, matrix)
            elif len(matrix.shape) == 3:
                _check_layout(matrix)
        generator = torch.Generator().manual_seed(seed)
        for matrix in targets:
            self.factors[matrix].add(name, spec, generator)
        self.specs[name] = spec

    def remove(self, name: str) -> None:
        for factors in self.factors.values():
            factors.pairs.pop(name, None)
        self.specs.pop(name, None)

    @contextmanager
    def serving(self, name: str | None) -> Iterator[None]:
        """Context in which forward passes apply the adapter `name`, or with None the base alone."""
        previous, self.serves.adapter = self.serves.adapter, name
        try:
            yield
        finally:
            self.serves.adapter = previous

    def pairs_of(self, name: str) -> dict[Matrix, Pair]:
        """Return A and B of one adapter, keyed by matrix."""
        return {matrix: factors.pairs[name] for matrix, factors in self.factors.items() if name in factors.pairs}

    def base_norms(self, name: str) -> dict[str, float]:
        """Return the Frobenius norm of the model's matrix under each pair of one adapter, by key."""
        norms = {
            matrix.key: torch.linalg.vector_norm(matrix.weight, dtype=torch.float32) for matrix in self.pairs_of(name)
        }
        return {key: float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for key, norm in norms.items()}

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Return the fp32 master weights of one adapter, keyed by `<key>.lora_A` and `<key>.lora_B` of each matrix."""
        pairs = [(matrix.key, pair) for matrix, pair in self.pairs_of(name).items()]
        return {f"{key}.{factor}": p for key, pair in pairs for factor, p in (("lora_A", pair.a), ("lora_B", pair.b))}


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """Yield all matrices that can be adapted: linear layers except routers, fused experts, and the output head."""
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


def _check_untied(model: Any, head: Matrix) -> None:
    if model.get_input_embeddings().weight is head.module.weight:
        raise RloraError(
            f"learner.head = true: the output head of {type(model).__name__} is tied to its embedding matrix, and "
            "an engine can't adapt the head without the embeddings; set learner.head = false"
        )


def _check_layout(matrix: Matrix) -> None:
    experts = matrix.module
    traits = [trait for trait in ("is_transposed", "has_bias") if getattr(experts, trait, False)]
    if traits or not hasattr(experts, "_apply_gate"):
        raise RloraError(
            f"model: the experts in {matrix.module_name} ({type(experts).__name__}: {', '.join(traits) or 'no gate'}) "
            'have a layout that rlora does not support; set learner.targets = "attention"'
        )
