"""Causal attention, forward alone and with its backward pass: ours beside XLA's, jax's and torch's.

All contenders read the same random inputs, grouped heads included, and are compared with the
formula in float32 before they are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.benchmarks.memory import with_torch_peak_bytes
from tinyllama_jax.benchmarks.rounds import attempt, interleave, ratio, wait_for
from tinyllama_jax.kernels.attention import api, cudnn
from tinyllama_jax.planning.compile import peak_bytes_of

# Largest difference from the formula, over the largest value, that is not a mistake.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
# A backward pass has five products of the size that the forward pass has two of.
_PASSES = {"forward": 1.0, "forward and backward": 3.5}

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Shape(NamedTuple):
    """B rows of S tokens, N query and K key/value heads of width H."""

    rows: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int


def compare(
    shape: Shape, dtype: str, *, rounds: int, calls: int, against_torch: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Times all contenders that run here; the first of ours is what the others are compared with.

    Returns:
      A row per pass and contender: milliseconds (median, least, most), TFLOP/s of the causal half,
      how many times faster ours is, bytes of memory at its fullest moment (None: nothing tells),
      and the largest difference from the formula; and by name, why a contender is absent.

    Raises:
      ValueError: a contender computes something else.
    """
    # Products of float32 on a GPU would be TensorFloat-32 otherwise; torch's are not.
    precision = "highest" if dtype == "float32" else None
    with jax.default_matmul_precision(precision):
        return _compare(shape, dtype, rounds, calls, against_torch)


def _compare(
    shape: Shape, dtype: str, rounds: int, calls: int, against_torch: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    B, S, N, _, H = shape
    arrays = _inputs(shape, dtype)
    expected = _passes(functools.partial(api.attention, implementation="reference"))
    with jax.default_matmul_precision("highest"):
        exact = jax.device_get(
            expected["forward and backward"](*(x.astype(jnp.float32) for x in arrays))
        )
    absent: dict[str, str] = {}
    contenders: dict[str, dict[str, Callable[[], Any]]] = {name: {} for name in _PASSES}
    peak_bytes: dict[tuple[str, str], int | None] = {}
    for name, function in _in_jax(shape, dtype).items():
        for which, run in _passes(function).items():
            compiled = attempt(name, functools.partial(_compiled, run, arrays), absent)
            if compiled is not None:
                contenders[which][name] = functools.partial(compiled, *arrays)
                peak_bytes[which, name] = peak_bytes_of(compiled)
    if against_torch:
        in_torch = attempt("torch SDPA", functools.partial(_in_torch, arrays), absent)
        for which, call in (in_torch or {}).items():
            contenders[which]["torch SDPA"] = call
    rows = []
    for which, calls_by_name in contenders.items():
        differences = {}
        for name, call in list(calls_by_name.items()):
            called = functools.partial(_called, call)
            found = attempt(name, functools.partial(with_torch_peak_bytes, called), absent)
            if found is None:
                del calls_by_name[name]
                continue
            result, counted = found
            peak_bytes.setdefault((which, name), counted)
            differences[name] = _difference(result, exact)
        for name, difference in differences.items():
            if not difference < _TOLERANCES[dtype]:
                raise ValueError(
                    f"{name} differs from the formula by {difference:.1e} of the largest value; a "
                    f"speed would mean nothing"
                )
        if _ours() not in differences:
            raise ValueError(f"{_ours()} does not run: {absent[_ours()]}")
        timings = interleave(calls_by_name, rounds=rounds, calls=calls, wait=wait_for)
        ours = timings[_ours()]
        work = 2 * B * N * S * S * H * _PASSES[which]
        rows += [
            {
                "pass": which,
                "contender": name,
                "milliseconds": 1e3 * timing.median,
                "least": 1e3 * min(timing.seconds),
                "most": 1e3 * max(timing.seconds),
                "tflops": work / timing.median / 1e12,
                "ours_is_faster_by": ratio(ours, timing),
                "peak_bytes": peak_bytes[which, name],
                "largest_difference": differences[name],
            }
            for name, timing in timings.items()
        ]
    return rows, absent


def _ours() -> str:
    return "flash (ours)" if jax.default_backend() == "gpu" else "folded (ours)"


def _compiled(run: Any, arrays: list[jax.Array]) -> jax.stages.Compiled:
    return run.lower(*arrays).compile()


def _called(call: Callable[[], Any]) -> Any:
    return wait_for(call())


def _inputs(shape: Shape, dtype: str) -> list[jax.Array]:
    """q, k, v and a cotangent of the output."""
    B, S, N, K, H = shape
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, S, N, H), (B, S, K, H), (B, S, K, H), (B, S, N, H))
    return [
        jax.random.normal(key, each).astype(dtype) for key, each in zip(keys, shapes, strict=True)
    ]


def _in_jax(shape: Shape, dtype: str) -> dict[str, Attention]:
    def ours(implementation: str) -> Attention:
        return lambda q, k, v: api.attention(q, k, v, implementation=implementation)

    def xla(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

    if jax.default_backend() != "gpu":
        return {_ours(): ours("folded"), "reference (ours)": ours("reference"), "XLA": xla}
    contenders: dict[str, Attention] = {_ours(): ours("flash")}
    if dtype in cudnn.DTYPES:
        contenders["cuDNN"] = ours("cudnn")
    return contenders | {"jax's Pallas, default blocks": _jax_pallas(shape), "XLA": xla}


def _jax_pallas(shape: Shape) -> Attention:
    from jax.experimental.pallas.ops.gpu import attention as pallas

    groups = shape.heads // shape.kv_heads

    def run(q, k, v):
        # It knows no grouped heads.
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
        return pallas.mha(q, k, v, None, sm_scale=shape.head_dim**-0.5, causal=True)

    return run


def _passes(function: Attention) -> dict[str, Callable[..., tuple[jax.Array, ...]]]:
    def forward(q, k, v, dout):
        return (function(q, k, v),)

    def both(q, k, v, dout):
        out, vjp = jax.vjp(function, q, k, v)
        return (out, *vjp(dout))

    return {"forward": jax.jit(forward), "forward and backward": jax.jit(both)}


def _in_torch(arrays: list[jax.Array]) -> dict[str, Callable[[], tuple[Any, ...]]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(arrays[0].dtype))
    q, k, v, dout = (
        torch.from_numpy(np.array(x.astype(jnp.float32))).to(device, dtype).transpose(1, 2)
        for x in arrays
    )
    q, k, v = (x.contiguous().requires_grad_() for x in (q, k, v))

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    def rows_first(results):
        return tuple(x.detach().transpose(1, 2) for x in results)

    def forward():
        with torch.no_grad():
            return rows_first((attend(),))

    def both():
        out = attend()
        return rows_first((out, *torch.autograd.grad(out, (q, k, v), dout)))

    return {"forward": forward, "forward and backward": both}


def _difference(found: tuple[Any, ...], exact: tuple[np.ndarray, ...]) -> float:
    def as_numpy(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array):
            return np.asarray(x.astype(jnp.float32))
        return x.float().cpu().numpy()

    pairs = zip(found, exact, strict=False)  # a forward pass has only the first
    return max(float(np.abs(as_numpy(a) - b).max() / np.abs(b).max()) for a, b in pairs)
