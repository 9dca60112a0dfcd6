"""The Llama 2 architecture (arXiv 2307.09288) as pure functions of a dict of params.

The axis alphabet, used in the whole package:

    B batch          D model width       F feed-forward width
    S query length   N query heads       V vocabulary
    T key length     K key/value heads   L layers
    H head width     G = N / K           query heads per key/value head

Params (float32; leaves under `layers` are stacked over L):

    embedding             (V, D)
    layers/attention_norm (L, D)
    layers/attention/     query (L, D, N, H)  key, value (L, D, K, H)  output (L, N, H, D)
    layers/mlp_norm       (L, D)
    layers/mlp/           gate, up (L, D, F)  down (L, F, D)
    final_norm            (D,)
    unembedding           (D, V), absent where the embedding is tied
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyllama_jax.config import ModelConfig
from tinyllama_jax.kernels import target
from tinyllama_jax.kernels.attention import cudnn
from tinyllama_jax.kernels.attention.api import attention
from tinyllama_jax.kernels.embedding import embed
from tinyllama_jax.kernels.linear import linear
from tinyllama_jax.model.cache import KVCache, write
from tinyllama_jax.parallel import mesh, rules
from tinyllama_jax.parallel.mesh import BATCH, TENSOR, P

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Llama:
    """A Llama of one config: functions of `params`, no state."""

    config: ModelConfig

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations; "auto" is bfloat16 on accelerators and float32 on CPU."""
        name = self.config.compute_dtype
        if name == "auto":
            # XLA:CPU emulates bfloat16, 10 to 50 times slower than float32.
            name = "float32" if target.current().platform == "cpu" else "bfloat16"
        return jnp.dtype(name)

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 params with TinyLlama's initialisation."""
        module = _Transformer(self.config, self.compute_dtype)
        # What a mesh can divide, and two tokens, since cuDNN takes no odd length.
        tokens = jnp.zeros((mesh.parts(BATCH), 2), jnp.int32)
        # Jitted, since op by op each initialiser would be compiled on its own.
        return jax.jit(lambda key: module.init(key, tokens, tokens, None, None)["params"])(key)

    def apply(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs all layers and the final norm.

        Args:
          params: as listed at the top of this module.
          tokens: `(B, S)` int32.
          positions: `(B, S)` int32, for the rotary embedding; None: `0 .. S-1`, or on from the
            cache's lengths.
          segment_ids: `(B, S)` int32; attention stays inside equal ids. Not with a cache.
          cache: keys and values of earlier tokens; each row's S new ones are written at its length.

        Returns:
          hidden `(B, S, D)` in the compute dtype, and the cache with `lengths + S` (None for None).
        """
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids mark packed training rows; a cache holds one text a row")
        B, S = tokens.shape
        if positions is None:
            start = 0 if cache is None else cache.lengths[:, None]
            positions = jnp.broadcast_to(start + jnp.arange(S), (B, S))
        module = _Transformer(self.config, self.compute_dtype)
        result: Any = module.apply({"params": params}, tokens, positions, segment_ids, cache)
        return result

    def unembed(self, params: Params) -> jax.Array:
        """The output matrix `(D, V)`."""
        return params["embedding"].T if self.config.tie_embeddings else params["unembedding"]

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Scores `(..., V)` float32 of the next token, from hidden `(..., D)`."""
        matrix = self.unembed(params).astype(hidden.dtype)
        return jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)


class _Transformer(nn.Module):
    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, cache):
        c = self.config
        embedding = self.param("embedding", _normal(c), (c.vocab_size, c.d_model))
        if not c.tie_embeddings:  # read by Llama.unembed
            self.param("unembedding", _normal(c), (c.d_model, c.vocab_size))
        x = embed(embedding, tokens, self.dtype)  # (B, S, D)
        x = mesh.constrain(x, P(BATCH))
        angles = rope_angles(positions, c.head_dim, c.rope_theta)
        lengths = None if cache is None else cache.lengths
        kv = None if cache is None else (cache.k, cache.v)
        layers = nn.scan(
            _remat(_Layer, c.remat, in_loop=0 < c.scan_unroll < c.num_layers),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            # Unrolled, the initialisers of every layer would be compiled: the same values, later.
            unroll=1 if self.is_initializing() else c.scan_unroll or c.num_layers,
        )
        x, kv = layers(c, name="layers")(x, kv, lengths, angles, segment_ids)
        x = rms_norm(x, self.param("final_norm", nn.initializers.ones, (c.d_model,)), c.norm_eps)
        if cache is not None:
            cache = KVCache(kv[0], kv[1], cache.lengths + tokens.shape[1])
        return x, cache


class _Layer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x, kv, lengths, angles, segment_ids):
        c = self.config
        ones = nn.initializers.ones
        normed = rms_norm(x, self.param("attention_norm", ones, (c.d_model,)), c.norm_eps)
        attended, kv = _Attention(c, name="attention")(normed, kv, lengths, angles, segment_ids)
        x = x + attended
        normed = rms_norm(x, self.param("mlp_norm", ones, (c.d_model,)), c.norm_eps)
        return mesh.constrain(x + _MLP(c, name="mlp")(normed), P(BATCH)), kv


class _Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x, kv, lengths, angles, segment_ids):
        c = self.config
        S, D = x.shape[1:]
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim

        def project(name: str, heads: int) -> jax.Array:
            weight = self.param(name, _normal(c), (D, heads, H))
            return linear(x, _gathered(weight, f"attention/{name}", x.dtype))  # (B, S, heads, H)

        q, k, v = project("query", N), project("key", K), project("value", K)
        q, k = rotate(q, angles), rotate(k, angles)
        if kv is None:
            out = attention(q, k, v, segment_ids=segment_ids, implementation=c.attention)
        else:
            slots = lengths[:, None] + jnp.arange(S)
            k, v = write(kv[0], k, slots), write(kv[1], v, slots)  # (B, T, K, H)
            kv = (k, v)
            # Every implementation but the reference is for training passes; decoding is bound by
            # the memory that it reads.
            out = attention(
                q, k, v, q_positions=slots, kv_lengths=lengths + S, implementation="reference"
            )
        output = self.param("output", _output_normal(c), (N, H, D))
        output = _gathered(output, "attention/output", x.dtype)
        return linear(out, output, contract=2), kv  # (B, S, D)


class _MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c = self.config

        def project(name: str) -> jax.Array:
            weight = self.param(name, _normal(c), (c.d_model, c.d_ff))
            return linear(x, _gathered(weight, f"mlp/{name}", x.dtype))  # (B, S, F)

        hidden = nn.silu(project("gate")) * project("up")
        down = self.param("down", _output_normal(c), (c.d_ff, c.d_model))
        return linear(hidden, _gathered(down, "mlp/down", x.dtype))  # (B, S, D)


def _gathered(weight: jax.Array, path: str, dtype: jnp.dtype) -> jax.Array:
    """A layer's weight in the compute dtype and, under a mesh, whole but for its `tensor` axis.

    It travels in the compute dtype, half the bytes, and so does its gradient: each device keeps its
    part of the sum over all. Left to the partitioner, that sum would come whole to every device on
    meshes with both `data` and `fsdp`.
    """
    if not mesh.sizes():
        return weight.astype(dtype)
    stored = rules.layer_spec(path)
    whole = P(*(axis if axis == TENSOR else None for axis in stored))

    @jax.custom_vjp
    def gather(weight: jax.Array) -> jax.Array:
        return mesh.constrain(mesh.constrain(weight.astype(dtype), stored), whole)

    def backward(_, gradient: jax.Array) -> tuple[jax.Array]:
        return (mesh.constrain(gradient, stored).astype(weight.dtype),)

    gather.defvjp(lambda weight: (gather(weight), None), backward)
    return gather(weight)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in float32; x's dtype out."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Rotary angles (arXiv 2104.09864): `(B, S, H/2)` float32 from positions `(B, S)`."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * frequencies


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns x `(B, S, heads, H)` by angles; channel i pairs with i + H/2, as in Hugging Face."""
    sin, cos = jnp.sin(angles)[:, :, None, :], jnp.cos(angles)[:, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def parameter_count(config: ModelConfig) -> int:
    """Number of params, without making them."""
    # What attention covers on this machine has no part in it.
    config = dataclasses.replace(config, attention="reference")
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _normal(config: ModelConfig):
    """TinyLlama's init of linear and embedding weights, "small init" of arXiv 1910.05895."""
    return nn.initializers.normal(math.sqrt(2 / (5 * config.d_model)))


def _output_normal(config: ModelConfig):
    """TinyLlama's init of the projections that write to the residual stream."""
    return nn.initializers.normal(1 / math.sqrt(config.d_model) / config.num_layers)


def _remat(layer, policy: str, in_loop: bool):
    """Wraps a layer so that its backward pass recomputes what the policy does not save.

    Outside a loop the compiler sees both passes at once and would merge what is computed again with
    what was computed before, so nothing would be freed: there it is kept from doing so (XLA:CPU
    does it all the same).
    """
    policies = jax.checkpoint_policies
    attention_only = policies.save_from_both_policies(
        policies.save_only_these_names("attention_out", "attention_lse"), cudnn.is_forward
    )
    if policy == "none":
        return layer
    saved = {
        "full": policies.nothing_saveable,
        "attention": attention_only,
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, attention_only
        ),
    }[policy]
    return nn.remat(layer, policy=saved, prevent_cse=not in_loop)
