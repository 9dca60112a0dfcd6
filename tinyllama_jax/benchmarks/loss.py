"""Output layer and cross-entropy, value and gradients: ours in chunks beside all logits at once.

Beside them the three matrix products alone, of all tokens at once and without any loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.benchmarks.memory import with_torch_peak_bytes
from tinyllama_jax.benchmarks.rounds import attempt, interleave, ratio, wait_for
from tinyllama_jax.kernels import cross_entropy
from tinyllama_jax.planning.compile import peak_bytes_of

_TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
_OURS, _PRODUCTS = "chunked (ours)", "its three products"


def compare(
    rows: int, seq_len: int, d_model: int, vocab_size: int, dtype: str, *,
    chunk_tokens: int, rounds: int, calls: int, against_torch: bool,
) -> tuple[list[dict[str, Any]], dict[str, str]]:  # fmt: skip
    """Times the loss of rows x seq_len random tokens.

    Returns:
      A row per contender: milliseconds (median, least, most), how many times faster ours is, bytes
      of memory at its fullest moment (None: nothing tells), and the largest difference of a
      gradient from the plain loss's in float32; and by name, why a contender is absent.

    Raises:
      ValueError: a contender computes something else.
    """
    # Products of float32 on a GPU would be TensorFloat-32 otherwise; torch's are not.
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        return _compare(
            rows, seq_len, d_model, vocab_size, dtype, chunk_tokens, rounds, calls, against_torch
        )


def _compare(
    rows: int, seq_len: int, d_model: int, vocab_size: int, dtype: str, chunk_tokens: int,
    rounds: int, calls: int, against_torch: bool,
) -> tuple[list[dict[str, Any]], dict[str, str]]:  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, seq_len, d_model)).astype(dtype)
    unembedding = jax.random.normal(keys[1], (d_model, vocab_size)) * d_model**-0.5
    targets = jax.random.randint(keys[2], (rows, seq_len), 0, vocab_size)
    weights = jnp.ones((rows, seq_len))
    arrays = (hidden, unembedding, targets, weights)
    chunked = functools.partial(cross_entropy.weighted_sum, chunk_tokens=chunk_tokens)
    functions = {
        _OURS: _gradients(chunked),
        "plain": _gradients(cross_entropy.reference_weighted_sum),
        _PRODUCTS: _products,
    }
    with jax.default_matmul_precision("highest"):
        exact = jax.device_get(
            jax.jit(_gradients(cross_entropy.reference_weighted_sum))(
                hidden.astype(jnp.float32), *arrays[1:]
            )
        )
    absent: dict[str, str] = {}
    contenders: dict[str, Callable[[], Any]] = {}
    peak_bytes: dict[str, int | None] = {}
    for name, function in functions.items():
        compiled = attempt(name, functools.partial(_compiled, function, arrays), absent)
        if compiled is not None:
            contenders[name] = functools.partial(compiled, *arrays)
            peak_bytes[name] = peak_bytes_of(compiled)
    if against_torch:
        in_torch = attempt("torch", functools.partial(_in_torch, arrays), absent)
        if in_torch is not None:
            contenders["torch"] = in_torch
    differences = {}
    for name, call in list(contenders.items()):
        called = functools.partial(_called, call)
        found = attempt(name, functools.partial(with_torch_peak_bytes, called), absent)
        if found is None:
            del contenders[name]
            continue
        result, counted = found
        peak_bytes.setdefault(name, counted)
        if name != _PRODUCTS:
            differences[name] = _difference(result, exact)
            if not differences[name] < _TOLERANCES[dtype]:
                raise ValueError(
                    f"{name} differs from the plain loss by {differences[name]:.1e} of the largest "
                    f"gradient; a speed would mean nothing"
                )
    if _OURS not in contenders:
        raise ValueError(f"{_OURS} does not run: {absent[_OURS]}")
    timings = interleave(contenders, rounds=rounds, calls=calls, wait=wait_for)
    result_rows = [
        {
            "contender": name,
            "milliseconds": 1e3 * timing.median,
            "least": 1e3 * min(timing.seconds),
            "most": 1e3 * max(timing.seconds),
            "ours_is_faster_by": ratio(timings[_OURS], timing),
            "peak_bytes": peak_bytes[name],
            "largest_difference": differences.get(name),
        }
        for name, timing in timings.items()
    ]
    return result_rows, absent


def _called(call: Callable[[], Any]) -> Any:
    return wait_for(call())


def _gradients(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`(hidden, unembedding, targets, weights) -> (dhidden, dunembedding, loss)`."""

    def run(hidden, unembedding, targets, weights):
        (value, _), gradients = jax.value_and_grad(
            lambda *x: loss(*x, targets, weights), argnums=(0, 1), has_aux=True
        )(hidden, unembedding)
        return (*gradients, value)

    return run


def _products(hidden, unembedding, targets, weights):
    """Logits, and what their gradient's two products would cost, on logits themselves."""
    x = hidden.reshape(-1, hidden.shape[-1])
    matrix = unembedding.astype(x.dtype)
    logits = (x @ matrix).astype(x.dtype)
    dmatrix = jnp.matmul(x.T, logits, preferred_element_type=jnp.float32)
    return logits @ matrix.T, dmatrix


def _compiled(function: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> jax.stages.Compiled:
    return jax.jit(function).lower(*arrays).compile()


def _in_torch(arrays: tuple[jax.Array, ...]) -> Callable[[], tuple[Any, ...]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(arrays[0].dtype))
    hidden, unembedding, targets = (
        torch.from_numpy(np.array(x.astype(jnp.float32)).astype(kind)).to(device)
        for x, kind in zip(arrays, (np.float32, np.float32, np.int64), strict=False)
    )
    hidden = hidden.to(dtype).requires_grad_()
    unembedding = unembedding.requires_grad_()

    def run():
        logits = (hidden @ unembedding.to(dtype)).float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        gradients = torch.autograd.grad(loss, (hidden, unembedding))
        return gradients

    return run


def _difference(found: tuple[Any, ...], exact: tuple[np.ndarray, ...]) -> float:
    def as_numpy(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array):
            return np.asarray(x.astype(jnp.float32))
        return x.detach().float().cpu().numpy()

    pairs = list(zip(found, exact, strict=False))[:2]
    return max(float(np.abs(as_numpy(a) - b).max() / np.abs(b).max()) for a, b in pairs)
