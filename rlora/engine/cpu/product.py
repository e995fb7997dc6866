"""The low-rank product over few rows, compiled for the CPU it runs on."""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def use_threads(count: int) -> None:
    """As many as that share each product that this thread asks for."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


_ANY_ORDER = {"reassoc", "contract", "nsz"}  # of additions, so that they are done side by side
_JIT = numba.njit(fastmath=_ANY_ORDER)


@intrinsic
def _read(typing: Any, number: Any) -> Any:
    """A number as fp32; 16 bits are a bfloat16."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if number == types.float32:
            return value
        bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(number), code


@intrinsic
def _rounded(typing: Any, value: Any, like: Any) -> Any:
    """An fp32 number as `like` holds it: to bfloat16 it is rounded to the nearest, ties to even."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float32:
            return arguments[0]
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        shift = ir.Constant(word, 16)
        odd = builder.and_(builder.lshr(bits, shift), ir.Constant(word, 1))
        up = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(up, shift), ir.IntType(16))

    return like(value, like), code


@numba.njit(parallel=True, fastmath=_ANY_ORDER)
def add(y: Any, x: Any, a: Any, b: Any, slots: Any, ranks: Any, ends: Any, scale: float) -> None:
    """y (rows, D) += scale B A x (rows, d_in), A and B of each row's slot; all in fp32, rounded once.

    a (slots, parts x r, d_in); b (slots, r, D), whose columns before ends[0] are of the first r rows of a, and so on.
    ranks (slots,): how many of the r each slot's adapter has; the rest, which are 0, are not read.
    """
    most = b.shape[1]
    for row in numba.prange(len(x)):
        slot = slots[row]
        rank = ranks[slot]
        if slot >= 0 and rank == 1:
            start = 0
            for part in range(len(ends)):
                h = np.float32(scale) * _dot(x[row], a[slot, part * most])
                _add_scaled_rounded(y[row, start : ends[part]], h, b[slot, 0, start : ends[part]])
                start = ends[part]
        elif slot >= 0:
            delta = np.zeros(b.shape[2], np.float32)
            start = 0
            for part in range(len(ends)):
                for r in range(rank):
                    h = np.float32(scale) * _dot(x[row], a[slot, part * most + r])
                    _add_scaled(delta[start : ends[part]], h, b[slot, r, start : ends[part]])
                start = ends[part]
            _add_rounded(y[row], delta)


@_JIT
def _dot(x: Any, a: Any) -> Any:
    total = np.float32(0)
    for k in range(len(x)):
        total += _read(x[k]) * _read(a[k])
    return total


@_JIT
def _add_scaled(delta: Any, h: Any, b: Any) -> None:
    for d in range(len(delta)):
        delta[d] += h * _read(b[d])


@_JIT
def _add_rounded(y: Any, delta: Any) -> None:
    for d in range(len(delta)):
        y[d] = _rounded(_read(y[d]) + delta[d], y[d])


@_JIT
def _add_scaled_rounded(y: Any, h: Any, b: Any) -> None:
    for d in range(len(y)):
        y[d] = _rounded(_read(y[d]) + h * _read(b[d]), y[d])
