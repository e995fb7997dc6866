"""Singular values, norms and directions of a low-rank update, exactly, from products of its small factors.

The update of a matrix is X = s B A, with A (r, d_in), B (d_out, r) and the scale s (Hu et al. 2021, arXiv:2106.09685).
X itself is never computed. All products are in float64:

    <X, X'>  = sum((B^T B') * (A A'^T))        inner product of two updates, with the scale in B
    sigma(X)^2 = eig(S (A A^T) S)              singular values, with S = (B^T B)^(1/2)
    X - X'   = [B - B', B'] [A; A - A']        the change of one step, which has rank 2 r at most
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import numpy
import numpy.typing

from rlora.core import peft_format
from rlora.records import Adapter

Array = numpy.typing.NDArray[numpy.float64]


@dataclass(frozen=True)
class Factors:
    """Factors of n matrices of equal shape, each with E experts (1 for a plain matrix). The updates are B A."""

    b: Array  # (n, E, d_out, r), times the scale
    a: Array  # (n, E, r, d_in)

    def dot(self, factors: "Factors") -> Array:
        """Compute the inner product of both updates for each matrix, summed over its experts: (n,)."""
        left, right = self.b.mT @ factors.b, self.a @ factors.a.mT
        return numpy.asarray((left * right).sum((1, 2, 3)))

    def minus(self, previous: "Factors") -> "Factors":
        """Return the factors of this update minus the previous one."""
        b, a = (self.b - previous.b, previous.b), (self.a, self.a - previous.a)
        return Factors(numpy.concatenate(b, -1), numpy.concatenate(a, -2))

    def singular_values(self) -> Array:
        """Compute the singular values of each matrix, in descending order; for experts the r largest of all: (n, r)."""
        squares, vectors = numpy.linalg.eigh(self.b.mT @ self.b)
        root = (vectors * numpy.sqrt(numpy.maximum(squares, 0.0))[..., None, :]) @ vectors.mT
        values = numpy.sqrt(numpy.maximum(numpy.linalg.eigvalsh(root @ (self.a @ self.a.mT) @ root), 0.0))
        return numpy.sort(values.reshape(len(values), -1), -1)[:, ::-1][:, : self.a.shape[-2]]


def low_rank_update(adapter: Adapter) -> dict[tuple[str, ...], Factors]:
    """Return the factors of the update that an adapter adds to the base, by the keys of their matrices."""
    spec, tensors = peft_format.decode(adapter.config, adapter.weights)
    modules = sorted({peft_format.parse(name)[0] for name in tensors}, key=_by_layer)
    stacks: dict[Any, dict[str, tuple[Array, Array]]] = defaultdict(dict)
    for module, key in peft_format.keys(json.loads(adapter.config), modules).items():
        a, b = (tensors[f"{peft_format.PREFIX}{module}.lora_{factor}.weight"].double().numpy() for factor in "AB")
        is_fused = key != module.removesuffix(".base_layer")
        rank = spec.rank_at(key, spec.rank) if is_fused else len(a)
        by_expert = b.reshape(len(b), rank, -1).transpose(2, 0, 1)  # PEFT interleaves the columns by expert
        stacks[a.shape, b.shape][key] = by_expert * spec.scale(key, rank), a.reshape(-1, rank, a.shape[1])
    return {
        tuple(pairs): Factors(numpy.stack([b for b, _ in pairs.values()]), numpy.stack([a for _, a in pairs.values()]))
        for pairs in stacks.values()
    }


def _by_layer(name: str) -> list[str | int]:
    """Sort key by which layer 10 follows layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Moved:
    """What a step changed, of one matrix or of all. X is the update after the step, Y before it, and D = X - Y."""

    norm: float  # Frobenius norm of X
    moved: float  # Frobenius norm of D
    cosine_last: float | None  # cosine between D and the change of the step before; None if one of them is 0
    cosine_update: float | None  # cosine between D and Y
    sigma: tuple[float, ...] = ()  # singular values of X, in descending order; empty for all matrices

    @staticmethod
    def of(products: Array, sigma: Sequence[float] = ()) -> "Moved":
        """Make the figures from the inner products <X, X>, <D, D>, <Y, Y>, <E, E>, <D, E>, <D, Y>, where E is the
        change of the step before."""
        x, d, y, e, d_e, d_y = products.tolist()
        norms = math.sqrt(max(0.0, x)), math.sqrt(max(0.0, d))  # rounding can make the square of 0 negative
        return Moved(*norms, _cosine(d_e, d, e), _cosine(d_y, d, y), tuple(sigma))


def rank_used(sigma: Sequence[float]) -> float | None:
    """Return the effective rank exp(H) of a matrix divided by the number of its singular values `sigma`, where H is the
    entropy of sigma / sum(sigma) (Roy and Vetterli 2007, "The effective rank"): from 1 / r to 1, None if all are 0."""
    shares = [value / total for value in sigma if value] if (total := sum(sigma)) else []
    return math.exp(-sum(share * math.log(share) for share in shares)) / len(sigma) if shares else None


def _cosine(product: float, square: float, other_square: float) -> float | None:
    return product / math.sqrt(square * other_square) if square > 0 and other_square > 0 else None


class Weights:
    """Measures how each step changes a policy's adapter.

    `versions` are the newest versions, at most two, in ascending order. `base_norms` are the Frobenius norms of the
    base's matrices, by key. There are no figures for full finetuning.
    """

    def __init__(self, base_norms: Mapping[str, float], versions: Sequence[Adapter]) -> None:
        self._versions = [low_rank_update(adapter) for adapter in versions if not adapter.full_weights]
        keys = [key for stack in self._versions[-1] for key in stack] if self._versions else []
        self.base_norms = {key: base_norms.get(key) for key in sorted(keys, key=_by_layer)}

    def measure(self, adapter: Adapter) -> tuple[dict[str, float | None], dict[str, Moved]]:
        """Return the metrics of the step that made `adapter`, as in docs/metrics.md, and the figures by matrix."""
        if not self._versions:
            return {}, {}
        versions = [*self._versions[-2:], low_rank_update(adapter)]
        self._versions, newest = versions[-2:], versions[-1]
        matrices: dict[str, Moved] = {}
        sums = numpy.zeros(6)
        for keys in newest:
            *earlier, y, x = (version[keys] for version in versions)
            d = x.minus(y)
            e = y.minus(earlier[0]) if earlier else None
            zeros = numpy.zeros(len(keys))
            products = numpy.stack(
                [x.dot(x), d.dot(d), y.dot(y), e.dot(e) if e else zeros, d.dot(e) if e else zeros, d.dot(y)], axis=1
            )
            sums += products.sum(0)
            rows = zip(keys, products, x.singular_values().tolist(), strict=True)
            matrices |= {key: Moved.of(row, sigma) for key, row, sigma in rows}
        total = Moved.of(sums)
        base_norm = math.hypot(*(norm or 0.0 for norm in self.base_norms.values()))
        used = [share for figures in matrices.values() if (share := rank_used(figures.sigma)) is not None]
        return {
            "weights/norm": total.norm,
            "weights/relative": total.norm / base_norm if base_norm else None,
            "weights/moved": total.moved,
            "weights/cosine_last": total.cosine_last,
            "weights/cosine_update": total.cosine_update,
            "weights/rank_used": fmean(used) if used else None,
        }, {key: matrices[key] for key in self.base_norms}


def weights_line(step: int, matrices: Mapping[str, Moved]) -> str:
    """Return a line of weights.jsonl: per figure a list by matrix, in the order of matrices.json, with 5 digits.

    The line is empty if there are no matrices.
    """
    if not matrices:
        return ""
    names = [field.name for field in fields(Moved)]
    columns = {name: [_rounded(getattr(moved, name)) for moved in matrices.values()] for name in names}
    return json.dumps({"step": step, **columns}, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    return None if value is None else float(f"{value:.5g}")


@dataclass(frozen=True)
class Path:
    """The path of a policy through weight space, over T versions, as points relative to the first one.

    The principal directions are those of the changes between consecutive versions, without centring: a path along a
    straight line has one.
    """

    explained: tuple[float, ...]  # share of the squared length of the changes, by principal direction
    coordinates: tuple[tuple[float, float], ...]  # T, along the first two principal directions
    cosines: tuple[float | None, ...]  # T - 1, between each change and the first principal direction
    straightness: float | None  # distance between the first and the last version, divided by the length of the path


def path_of(adapters: Sequence[Adapter]) -> Path:
    """Compute the path of T adapters, at least two, over the same matrices.

    The inner products of all T - 1 changes follow from products of the factors; the principal directions are the
    eigenvectors of their Gram matrix.
    """
    versions = [low_rank_update(adapter) for adapter in adapters]
    products = numpy.zeros((len(versions), len(versions)))  # of the updates
    for keys in versions[0]:
        factors = [version[keys] for version in versions]
        for row, left in enumerate(factors):
            for column, right in enumerate(factors[: row + 1]):
                products[row, column] += left.dot(right).sum()
    products += numpy.tril(products, -1).T
    gram = numpy.diff(numpy.diff(products, axis=0), axis=1)  # of the changes
    values, vectors = numpy.linalg.eigh(gram)
    values, vectors = numpy.maximum(values[::-1], 0.0), vectors[:, ::-1]
    vectors *= numpy.where(vectors.sum(0) < 0, -1.0, 1.0)  # forwards
    along = vectors * numpy.sqrt(values)  # (T - 1, T - 1): of each change, along each direction
    lengths = numpy.sqrt(numpy.maximum(gram.diagonal(), 0.0))
    points = numpy.concatenate((numpy.zeros((1, along.shape[1])), along.cumsum(0)))
    if points.shape[1] < 2:
        points = numpy.pad(points, ((0, 0), (0, 1)))
    total = values.sum()
    return Path(
        explained=tuple((values / total).tolist()) if total else (),
        coordinates=tuple((float(x), float(y)) for x, y in points[:, :2]),
        cosines=tuple(float(a / n) if n else None for a, n in zip(along[:, 0], lengths, strict=True)),
        straightness=float(numpy.linalg.norm(points[-1]) / lengths.sum()) if lengths.any() else None,
    )
