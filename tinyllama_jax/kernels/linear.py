"""Matrix products of activations with weights, in the form that each backend runs well."""

from __future__ import annotations

import math

import jax

from tinyllama_jax.kernels import target


def linear(x: jax.Array, weight: jax.Array, *, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` axes of x with the first ones of weight.

    Args:
      x: `(..., *I)` in the compute dtype.
      weight: `(*I, *O)`, of any float dtype; cast to x's.
      contract: number of axes in `I`.

    Returns:
      `(..., *O)` in x's dtype. `linear(x, query)` is `einsum("bsd,dnh->bsnh", x, query)`.
    """
    inner, outer = weight.shape[:contract], weight.shape[contract:]
    assert x.shape[x.ndim - contract :] == inner, (x.shape, weight.shape, contract)
    batch = x.shape[: x.ndim - contract]
    rows = x.reshape(math.prod(batch), math.prod(inner))
    matrix = weight.astype(x.dtype).reshape(math.prod(inner), math.prod(outer))
    on_cpu = target.current().platform == "cpu"
    product = _matmul_cpu(rows, matrix) if on_cpu else rows @ matrix
    return product.reshape(*batch, *outer)


@jax.custom_vjp
def _matmul_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight` for `(M, I)` and `(I, O)`, with a backward pass that XLA:CPU runs well.

    By default XLA:CPU fuses the elementwise backward that makes dy (SwiGLU's, above all) into a
    transposing copy ahead of the weight gradient's matmul, 35 ms a layer at 4,096 x 256 x 704. The
    barrier makes dy exist once, and contracting axis 0 of both operands needs no transposed copy.
    """
    return x @ weight


def _matmul_cpu_forward(x, weight):
    return x @ weight, (x, weight)


def _matmul_cpu_backward(residuals, dy):
    x, weight = residuals
    dy = jax.lax.optimization_barrier(dy)
    dx = jax.lax.dot_general(dy, weight, (((1,), (1,)), ((), ())))
    dweight = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))
    return dx, dweight


_matmul_cpu.defvjp(_matmul_cpu_forward, _matmul_cpu_backward)
