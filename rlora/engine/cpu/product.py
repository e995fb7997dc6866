"""The low-rank product over few rows, compiled by numba for this machine's CPU."""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def use_threads(count: int) -> None:
    """Set how many threads compute each product that the calling thread starts; numba's own limit still applies."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


RANKS = 1, 2, 4, 8  # that have a product
_ANY_ORDER = {"reassoc", "contract", "nsz"}  # additions may be reordered, which lets the compiler vectorise them
_JIT = numba.njit(fastmath=_ANY_ORDER)


@intrinsic
def _read(typing: Any, number: Any) -> Any:
    """Convert a number to fp32. A 16-bit integer has the bits of a bfloat16."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if number == types.float32:
            return value
        bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(number), code


@intrinsic
def _round_like(typing: Any, value: Any, like: Any) -> Any:
    """Convert an fp32 number to the type of `like`: fp32, or the bits of the nearest bfloat16, ties to even."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float32:
            return arguments[0]
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        shift = ir.Constant(word, 16)
        odd = builder.and_(builder.lshr(bits, shift), ir.Constant(word, 1))
        total = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(total, shift), ir.IntType(16))

    return like(value, like), code


@_JIT
def _dot(x: Any, a: Any) -> Any:
    total = np.float32(0)
    for k in range(len(x)):
        total += _read(x[k]) * _read(a[k])
    return total


@_JIT
def _hidden_1(rank: int, a: Any, x: Any, scale: Any) -> Any:
    """Return component `rank` of scale A x as a tuple of one number."""
    return (scale * _dot(x, a[rank]),)


@_JIT
def _columns_1(rank: int, b: Any, start: int, end: int) -> Any:
    """Return the entries `start` to `end` of column `rank` of B as a tuple of one array."""
    return (b[rank, start:end],)


def _twice(function: Any, count: int) -> Any:
    """Return a function for twice as many ranks as `function`, whose tuples have `count` ranks from `rank` on."""

    @_JIT
    def both(rank: int, *arguments: Any) -> Any:
        return function(rank, *arguments) + function(rank + count, *arguments)

    return both


_hidden_2, _columns_2 = _twice(_hidden_1, 1), _twice(_columns_1, 1)
_hidden_4, _columns_4 = _twice(_hidden_2, 2), _twice(_columns_2, 2)
_hidden_8, _columns_8 = _twice(_hidden_4, 4), _twice(_columns_4, 4)


@_JIT
def _add_columns(y: Any, hidden: Any, columns: Any) -> None:
    """Add the sum over r of hidden[r] columns[r] to y (d,). Tuples make the compiler unroll the loop over r."""
    for d in range(len(y)):
        total = _read(y[d])
        for r in range(len(hidden)):
            total += hidden[r] * _read(columns[r][d])
        y[d] = _round_like(total, y[d])


def _add(y: Any, x: Any, a: Any, b: Any, slots: Any, ranks: Any, ends: Any, scale: float) -> None:
    """Add scale B A x to y (rows, D), with A and B of each row's slot. Computes in fp32 and rounds once.

    x: (rows, d_in). slots (rows,): the slot of each row, -1 for none. a: (slots, parts x r, d_in), with r in `RANKS`.
    b: (slots, r, D). ends (parts,): the columns of b before ends[0] belong to the first r rows of a, the next ones up
    to ends[1] to the next r rows, and so on. ranks (slots,): the rank of each slot's adapter, at most r. If a rank is
    not in `RANKS`, a and b are read up to the next number in `RANKS`, and must be zero beyond the adapter's rank.
    """
    max_rank, factor = b.shape[1], np.float32(scale)
    for row in numba.prange(len(x)):
        slot = slots[row]
        rank = ranks[slot]
        start = 0
        for part in range(len(ends) if slot >= 0 else 0):
            first, end = part * max_rank, ends[part]
            outputs = y[row, start:end]
            if rank == 1:
                _add_columns(outputs, _hidden_1(first, a[slot], x[row], factor), _columns_1(0, b[slot], start, end))
            elif rank == 2:
                _add_columns(outputs, _hidden_2(first, a[slot], x[row], factor), _columns_2(0, b[slot], start, end))
            elif rank <= 4:
                _add_columns(outputs, _hidden_4(first, a[slot], x[row], factor), _columns_4(0, b[slot], start, end))
            else:
                _add_columns(outputs, _hidden_8(first, a[slot], x[row], factor), _columns_8(0, b[slot], start, end))
            start = end


def _compile(function: Any) -> Any:
    """Return `function`, compiled at its first call, which takes seconds. The result is cached on disk if possible."""
    options = {"parallel": True, "fastmath": _ANY_ORDER}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:
        return numba.njit(function, **options)


add = _compile(_add)
