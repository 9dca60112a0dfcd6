"""The kernels on 8 devices equal themselves on one, and send no matrix within a loop."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from tinyllama_jax.kernels import cross_entropy, target
from tinyllama_jax.kernels.attention import api
from tinyllama_jax.kernels.embedding import embed
from tinyllama_jax.parallel.mesh import BATCH, TENSOR, P, make_mesh
from tinyllama_jax.planning.collectives import collectives

B, S, D, V, CHUNK = 8, 24, 16, 64, 10  # chunks divide the tokens of no mesh
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (1, 4, 2), (2, 2, 2)]


def close(found, expected, what):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < 2e-6, f"{what}: {error:.1e}"


def loss_example(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (B, S, D)).astype(dtype)
    unembedding = jax.random.normal(keys[1], (D, V)) * 0.5
    targets = jax.random.randint(keys[2], (B, S), 0, V)
    weights = jax.random.uniform(keys[3], (B, S)).at[2, 4:9].set(0)
    factors = jax.random.normal(keys[4], (B, S))
    return hidden, unembedding, targets, weights, factors


def losses(hidden, unembedding, targets, weights, factors):
    """Values and gradients of both loss functions."""

    def summed(hidden, unembedding):
        return cross_entropy.weighted_sum(
            hidden, unembedding, targets, weights, z_loss=0.01, chunk_tokens=CHUNK
        )

    def per_token(hidden, unembedding):
        logps = cross_entropy.token_logps(hidden, unembedding, targets, chunk_tokens=CHUNK)
        return jnp.sum(factors * logps), logps

    return [
        jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, unembedding)
        for f in (summed, per_token)
    ]


def placed(mesh, arrays, specs):
    return [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(arrays, specs, strict=True)
    ]


LOSS_SPECS = (P(BATCH), P("fsdp", TENSOR), P(BATCH), P(BATCH), P(BATCH))


def check_losses(mesh, expected):
    arrays = placed(mesh, loss_example(), LOSS_SPECS)
    undifferentiated = jax.jit(
        lambda h, u, t, w: cross_entropy.weighted_sum(h, u, t, w, z_loss=0.01, chunk_tokens=CHUNK)
    )
    with jax.set_mesh(mesh):
        step = jax.jit(losses)
        close(step(*arrays), expected, f"losses on {dict(mesh.shape)}")
        close(undifferentiated(*arrays[:4])[0], expected[0][0][0], "without gradient")
        text = step.lower(*arrays).compile().as_text()
    in_loops = [c for c in collectives(text) if c.in_loop and c.elements > CHUNK]
    assert not in_loops, f"{dict(mesh.shape)}: {in_loops}"


def check_that_the_check_sees(mesh):
    """Left to the partitioner, the same loop sends the matrix in every chunk."""
    arrays = placed(mesh, loss_example(), LOSS_SPECS)
    text = jax.jit(losses).lower(*arrays).compile().as_text()
    assert any(c.in_loop and c.elements >= D * V // 8 for c in collectives(text))


def check_attention(mesh, implementation):
    N, K, H = 16, 8, 32
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = [(B, 40, N, H), (B, 40, K, H), (B, 40, K, H), (B, 40, N, H)]
    arrays = [jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)]
    segment_ids = jnp.cumsum(jax.random.uniform(keys[0], (B, 40)) < 0.1, axis=1)

    def values_and_gradients(q, k, v, dout, segment_ids, implementation):
        out, vjp = jax.vjp(
            lambda *x: api.attention(*x, segment_ids=segment_ids, implementation=implementation),
            q, k, v,
        )  # fmt: skip
        return (out, *vjp(dout))

    run = jax.jit(values_and_gradients, static_argnames="implementation")
    expected = run(*arrays, segment_ids, implementation="reference")
    heads = P(BATCH, None, TENSOR)
    sharded = placed(mesh, [*arrays, segment_ids], [heads] * 4 + [P(BATCH)])
    with jax.set_mesh(mesh):
        close(run(*sharded, implementation=implementation), expected, implementation)
        text = run.lower(*sharded, implementation=implementation).compile().as_text()
    assert not collectives(text), f"{implementation} on {dict(mesh.shape)}: {collectives(text)}"


def check_embedding(mesh, device):
    """As a GPU sums it and as a CPU does; what travels is the table once, and rows."""
    keys = jax.random.split(jax.random.key(2), 3)
    table = jax.random.normal(keys[0], (V, D))
    tokens = jax.random.randint(keys[1], (B, S), 0, V)
    dx = jax.random.normal(keys[2], (B, S, D))

    def values_and_gradients(table, tokens, dx):
        x, vjp = jax.vjp(lambda table: embed(table, tokens, jnp.float32), table)
        return x, *vjp(dx)

    expected = jax.jit(values_and_gradients)(table, tokens, dx)
    arrays = placed(mesh, [table, tokens, dx], [P(TENSOR, "fsdp"), P(BATCH), P(BATCH)])
    with jax.set_mesh(mesh), target.compile_for(device):
        run = jax.jit(lambda *x: values_and_gradients(*x))  # a trace for this device
        found = run(*arrays)
        close(found, expected, f"{device.platform} on {dict(mesh.shape)}")
        assert found[1].sharding.is_equivalent_to(arrays[0].sharding, 2), found[1].sharding


def check_refusals(mesh):
    hidden, unembedding, targets, weights, _ = loss_example()
    with jax.set_mesh(mesh):
        for arguments, reason in [
            ((hidden[:3], unembedding, targets[:3], weights[:3]), "batch = 3 does not divide"),
            ((hidden, unembedding[:, :63], targets, weights), "model.vocab_size = 63 does not"),
        ]:
            try:
                cross_entropy.weighted_sum(*arguments)
            except ValueError as error:
                assert reason in str(error), error
            else:
                raise AssertionError(f"not refused: {reason}")
        q = jnp.zeros((8, 4, 3, 32))
        try:
            api.attention(q, q, q, implementation="folded")
        except ValueError as error:
            assert "model.num_kv_heads = 3 does not divide over the 2 devices" in str(error), error
        else:
            raise AssertionError("3 heads on 2 devices were not refused")


def main(what: str) -> None:
    assert len(jax.devices()) == 8
    if what == "losses":
        expected = jax.jit(losses)(*loss_example())
        for shape in MESHES:
            check_losses(make_mesh(shape), expected)
        check_that_the_check_sees(make_mesh((2, 4, 1)))
    elif what == "attention":
        for shape in [(2, 2, 2), (1, 8, 1), (1, 1, 8)]:
            check_attention(make_mesh(shape), "folded")
        check_attention(make_mesh((2, 2, 2)), "flash")
    elif what == "embedding":
        for shape in MESHES:
            for device in (target.Target("cpu"), target.Target("gpu", (9, 0))):
                check_embedding(make_mesh(shape), device)
    else:
        check_refusals(make_mesh((2, 2, 2)))


if __name__ == "__main__":
    main(sys.argv[1])
