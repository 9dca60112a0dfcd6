"""The kernels of `flash.py` and how each is laid over its arrays.

Arrays are `(B, S, N, H)` for q, out and their gradients, `(B, T, K, H)` for k, v and theirs, and
`(B, N, S)` float32 for what there is one of per row. Lengths are multiples of every block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tinyllama_jax.kernels.attention.reference import MASKED

_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one kernel is cut: queries and keys per block, warps per program, stages in flight."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Tuning(NamedTuple):
    """The blocks of the three kernels."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


class Static(NamedTuple):
    """What the kernels are specialised on."""

    causal: bool
    valid_keys: int  # keys past it are padding
    blocks: Tuning
    interpret: bool

    def padded(self, S: int) -> tuple[int, int, int]:
        """Lengths of q, k and v that every kernel's blocks divide; sizes are powers of two."""
        rows = max(b.queries for b in self.blocks)
        keys = max(b.keys for b in self.blocks)
        if self.causal:  # rows and keys have the same positions
            rows = keys = max(rows, keys)
        T = pl.cdiv(self.valid_keys, keys) * keys
        return pl.cdiv(S, rows) * rows, T, T


def _call(kernel, blocks: Blocks, interpret: bool, **specs):
    """Runs a kernel: the one place that knows which compiler makes it.

    Triton compiles for every GPU since Ampere. jax deprecates it in favour of Mosaic GPU, whose
    kernels are written for one generation each; one for Hopper would be chosen here.
    """
    from jax.experimental.pallas import triton

    parameters = triton.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages)
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=interpret, **specs)


# Forward and dq: one program per block of queries and query head.


def forward(q, k, v, segments, static):
    B, S, N, H = q.shape
    blocks = static.blocks.forward
    kernel = functools.partial(_forward_kernel, static=static, H=H, num_blocks=S // blocks.queries)
    specs, extra = _query_specs(q, k, segments, static, blocks)
    row = specs.row
    return _call(
        kernel, blocks, static.interpret,
        grid=specs.grid,
        in_specs=[specs.q, specs.k, specs.k, *specs.extra],
        out_specs=[specs.q, row],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((B, N, S), jnp.float32),
        ],
        name="flash_attention_forward",
    )(q, k, v, *extra)  # fmt: skip


def dq(q, k, v, dout, lse, delta, segments, static):
    S, H = q.shape[1], q.shape[3]
    blocks = static.blocks.dq
    kernel = functools.partial(_dq_kernel, static=static, H=H, num_blocks=S // blocks.queries)
    specs, extra = _query_specs(q, k, segments, static, blocks)
    return _call(
        kernel, blocks, static.interpret,
        grid=specs.grid,
        in_specs=[specs.q, specs.k, specs.k, specs.q, specs.row, specs.row, *specs.extra],
        out_specs=specs.q,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="flash_attention_dq",
    )(q, k, v, dout, lse, delta, *extra)  # fmt: skip


class _QuerySpecs(NamedTuple):
    grid: tuple[int, int, int]
    q: pl.BlockSpec  # a block of rows of a query head
    k: pl.BlockSpec  # all rows of its key/value head
    row: pl.BlockSpec  # a number per row of the block
    extra: list[pl.BlockSpec]  # of the segments


def _query_specs(q, k, segments, static, blocks):
    B, S, N, H = q.shape
    T, K = k.shape[1:3]
    G = N // K
    last = S // blocks.queries - 1
    # Heads vary fastest, so that those which read the same keys run together; under a causal mask
    # the blocks with most keys go first, and the short ones fill up the end.
    specs = _QuerySpecs(
        grid=(N, S // blocks.queries, B),
        q=pl.BlockSpec((None, blocks.queries, None, H), lambda n, i, b: (b, last - i, n, 0)),
        k=pl.BlockSpec((None, T, None, H), lambda n, i, b: (b, 0, n // G, 0)),
        row=pl.BlockSpec((None, None, blocks.queries), lambda n, i, b: (b, n, last - i)),
        extra=[
            pl.BlockSpec((None, blocks.queries), lambda n, i, b: (b, last - i)),
            pl.BlockSpec((None, T), lambda n, i, b: (b, 0)),
            pl.BlockSpec((None, None, 2), lambda n, i, b: (b, last - i, 0)),
        ],
    )
    if segments is None:
        return specs._replace(extra=[]), ()
    overlap = _overlap(segments, blocks, static.causal)  # (B, query blocks, key blocks)
    return specs, (*segments, _ranges(overlap))


def _overlap(segments, blocks: Blocks, causal: bool) -> jax.Array:
    """Which blocks may hold a pair of the same segment: bool (B, query blocks, key blocks)."""
    q, k = (
        ids.reshape(ids.shape[0], -1, size)
        for ids, size in zip(segments, (blocks.queries, blocks.keys), strict=True)
    )
    q_least, q_most = q.min(axis=-1)[:, :, None], q.max(axis=-1)[:, :, None]
    k_least, k_most = k.min(axis=-1)[:, None, :], k.max(axis=-1)[:, None, :]
    overlap = (q_least <= k_most) & (k_least <= q_most)
    if causal:
        last_row = (jnp.arange(q.shape[1]) + 1) * blocks.queries - 1
        overlap &= jnp.arange(k.shape[1]) * blocks.keys <= last_row[:, None]
    return overlap


def _ranges(overlap: jax.Array) -> jax.Array:
    """First block and past the last one that overlap, along the last axis: int32 (..., 2)."""
    count = overlap.shape[-1]
    first = jnp.argmax(overlap, axis=-1)
    last = count - jnp.argmax(overlap[..., ::-1], axis=-1)
    some = overlap.any(axis=-1)
    return jnp.stack([jnp.where(some, first, 0), jnp.where(some, last, 0)], -1).astype(jnp.int32)


def _key_loop(body, carry, start, T, segments, static, blocks):
    """Runs `body(masked, block, carry)` over the key blocks that rows from `start` on see."""
    count = T // blocks.keys
    if segments:
        lo, hi = segments[2][0], segments[2][1]
        return jax.lax.fori_loop(lo, hi, functools.partial(body, True), carry)
    if static.causal:
        plain = jax.lax.div(start + 1, blocks.keys)
        stop = jax.lax.div(start + blocks.queries + blocks.keys - 1, blocks.keys)
    else:
        plain, stop = static.valid_keys // blocks.keys, count
    carry = jax.lax.fori_loop(0, plain, functools.partial(body, False), carry)
    return jax.lax.fori_loop(plain, stop, functools.partial(body, True), carry)


def _seen(start_row, start_key, shape, axes, segments, static):
    """Bool mask of a block whose rows and keys lie along the axes given."""
    row_axis, key_axis = axes
    keys = start_key + jax.lax.broadcasted_iota(jnp.int32, shape, key_axis)
    seen = None
    if static.causal:
        seen = keys <= start_row + jax.lax.broadcasted_iota(jnp.int32, shape, row_axis)
    else:
        seen = keys < static.valid_keys
    if segments is not None:
        rows, others = segments
        seen &= jnp.expand_dims(rows, key_axis) == jnp.expand_dims(others, row_axis)
    return seen


def _dot(a, b, contract=(1, 0)):
    """Contracts one axis of each; float32 out."""
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _forward_kernel(q_ref, k_ref, v_ref, *refs, static, H, num_blocks):
    *segments, out_ref, lse_ref = refs
    blocks = static.blocks.forward
    start = (num_blocks - 1 - pl.program_id(1)) * blocks.queries
    scale = H**-0.5
    q = q_ref[...]
    rows = segments[0][...] if segments else None

    def body(masked, block, carry):
        acc, total, largest = carry
        at = pl.ds(block * blocks.keys, blocks.keys)
        k, v = k_ref[at, :], v_ref[at, :]
        scores = _dot(q, k, (1, 1))
        if masked:
            same = (rows, segments[1][at]) if segments else None
            seen = _seen(start, block * blocks.keys, scores.shape, (0, 1), same, static)
            scores = jnp.where(seen, scores, MASKED)
        larger = jnp.maximum(largest, scores.max(axis=1))
        # The scale goes into the exponent, where it costs nothing and rounds nothing.
        correction = jnp.exp2((largest - larger) * (scale * _LOG2_E))
        p = jnp.exp2((scores - larger[:, None]) * (scale * _LOG2_E))
        total = total * correction + p.sum(axis=1)
        acc = acc * correction[:, None] + _dot(p.astype(v.dtype), v)
        return acc, total, larger

    carry = (
        jnp.zeros((blocks.queries, H), jnp.float32),
        jnp.zeros((blocks.queries,), jnp.float32),
        jnp.full((blocks.queries,), MASKED, jnp.float32),
    )
    acc, total, largest = _key_loop(body, carry, start, k_ref.shape[0], segments, static, blocks)
    total = jnp.where(total == 0, 1.0, total)  # of a row without a single block to look at
    out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = largest * scale + jnp.log(total)


def _dq_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, static, H, num_blocks):
    *segments, dq_ref = refs
    blocks = static.blocks.dq
    start = (num_blocks - 1 - pl.program_id(1)) * blocks.queries
    scale = H**-0.5
    q, dout = q_ref[...], dout_ref[...]
    lse, delta = lse_ref[...] * _LOG2_E, delta_ref[...]
    rows = segments[0][...] if segments else None

    def body(masked, block, dq):
        at = pl.ds(block * blocks.keys, blocks.keys)
        k, v = k_ref[at, :], v_ref[at, :]
        p = jnp.exp2(_dot(q, k, (1, 1)) * (scale * _LOG2_E) - lse[:, None])
        if masked:
            same = (rows, segments[1][at]) if segments else None
            seen = _seen(start, block * blocks.keys, p.shape, (0, 1), same, static)
            p = jnp.where(seen, p, 0.0)
        ds = p * (_dot(dout, v, (1, 1)) - delta[:, None])
        return dq + _dot(ds.astype(k.dtype), k)

    zero = jnp.zeros((blocks.queries, H), jnp.float32)
    dq = _key_loop(body, zero, start, k_ref.shape[0], segments, static, blocks)
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


# dk and dv: one program per block of keys and key/value head, for all query heads of its group.


def dkv(q, k, v, dout, lse, delta, segments, static):
    B, S, N, H = q.shape
    T, K = k.shape[1:3]
    G = N // K
    blocks = static.blocks.dkv
    of_group = pl.BlockSpec((None, S, G, H), lambda n, i, b: (b, 0, n, 0))
    of_rows = pl.BlockSpec((None, G, S), lambda n, i, b: (b, n, 0))
    of_keys = pl.BlockSpec((None, blocks.keys, None, H), lambda n, i, b: (b, i, n, 0))
    extra, extra_specs = (), []
    if segments is not None:
        overlap = _overlap(segments, blocks, static.causal).transpose(0, 2, 1)
        extra = (*segments, _ranges(overlap))
        extra_specs = [
            pl.BlockSpec((None, S), lambda n, i, b: (b, 0)),
            pl.BlockSpec((None, blocks.keys), lambda n, i, b: (b, i)),
            pl.BlockSpec((None, None, 2), lambda n, i, b: (b, i, 0)),
        ]
    return _call(
        functools.partial(_dkv_kernel, static=static, H=H, G=G), blocks, static.interpret,
        grid=(K, T // blocks.keys, B),
        in_specs=[of_group, of_keys, of_keys, of_group, of_rows, of_rows, *extra_specs],
        out_specs=[of_keys, of_keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        name="flash_attention_dkv",
    )(q, k, v, dout, lse, delta, *extra)  # fmt: skip


def _dkv_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, static, H, G):
    *segments, dk_ref, dv_ref = refs
    blocks = static.blocks.dkv
    start = pl.program_id(1) * blocks.keys
    scale = H**-0.5
    k, v = k_ref[...], v_ref[...]
    keys = segments[1][...] if segments else None

    def body(masked, head, block, carry):
        dk, dv = carry
        at = pl.ds(block * blocks.queries, blocks.queries)
        q, dout = q_ref[at, head, :], dout_ref[at, head, :]
        lse, delta = lse_ref[head, at] * _LOG2_E, delta_ref[head, at]
        # Scores the other way round, keys x queries: no block is ever transposed for a product.
        p = jnp.exp2(_dot(k, q, (1, 1)) * (scale * _LOG2_E) - lse[None, :])
        if masked:
            same = (segments[0][at], keys) if segments else None
            seen = _seen(block * blocks.queries, start, p.shape, (1, 0), same, static)
            p = jnp.where(seen, p, 0.0)
        dv += _dot(p.astype(dout.dtype), dout)
        ds = p * (_dot(v, dout, (1, 1)) - delta[None, :])
        dk += _dot(ds.astype(q.dtype), q)
        return dk, dv

    def over(masked, first, stop, carry):
        """All heads of the group, block by block: one loop, so that loads run ahead throughout."""
        count = stop - first

        def step(number, carry):
            head = jax.lax.div(number, jnp.maximum(count, 1))  # may be hoisted where count is 0
            return body(masked, head, first + number - head * count, carry)

        return jax.lax.fori_loop(0, G * count, step, carry)

    zero = jnp.zeros((blocks.keys, H), jnp.float32)
    count = q_ref.shape[0] // blocks.queries
    if segments:
        dk, dv = over(True, segments[2][0], segments[2][1], (zero, zero))
    elif static.causal:
        first = jax.lax.div(start, blocks.queries)
        plain = jax.lax.div(start + blocks.keys - 1 + blocks.queries - 1, blocks.queries)
        plain = jnp.minimum(plain, count)
        carry = over(True, first, plain, (zero, zero))
        dk, dv = over(False, plain, count, carry)
    else:
        # Padded keys get gradients of their own, which are cut off with them.
        dk, dv = over(False, jnp.int32(0), jnp.int32(count), (zero, zero))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
