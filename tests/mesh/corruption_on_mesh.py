"""A bit that flips in one device is found and named; on 8 devices, 4 x 2 x 1.

python -m tests.mesh.corruption_on_mesh
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.mesh.step_on_mesh import batch_at, config_for
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.parallel import mesh, rules
from tinyllama_jax.training import corruption
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state

ROWS = 16


def with_flipped_bit(array: jax.Array, device: int) -> jax.Array:
    """The array, with the last bit of one element flipped in what one device holds."""
    parts = []
    for shard in array.addressable_shards:
        data = np.asarray(shard.data).copy()
        if shard.device.id == device:
            data.view(np.uint32).ravel()[7] ^= 1
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def main() -> None:
    config = config_for(8, kv_heads=8)
    model = Llama(config.model)
    with mesh.in_use((4, 2, 1)):
        params = init_state(model, make_optimizer(config.optimizer), seed=0).params
        batch = rules.place_rows(batch_at(0), ROWS)
        check = corruption.make_checks(model, NextToken(config), config)
        check(1, params, batch)

        gate = params["layers"]["mlp"]["gate"]
        for device in range(8):
            flipped = jax.tree.map(lambda leaf: leaf, params)
            flipped["layers"]["mlp"]["gate"] = with_flipped_bit(gate, device)
            with pytest.raises(ValueError, match=rf"copy {device // 2} of 4 along data") as found:
                check(2, flipped, batch)
            assert "process 0: " in str(found.value)

        # Between the two computations, in the copy of one device: ahead of the sum over all rows.
        given = iter([params, flipped])
        real = corruption.summed_gradients
        prints = jax.jit(
            lambda p, b: corruption._prints_by_device(
                real(model, NextToken(config), p, b, None, ROWS // 2)[0]
            )
        )
        once, again = (np.asarray(prints(next(given), batch)) for _ in range(2))
        assert once.shape == (4, 2, 1) and (once != again).any()
        with pytest.raises(ValueError, match="computed twice from the same state, differs in") as e:
            corruption.require_equal_gradients(3, once, again)
        assert "all that share a sum" in str(e.value)
        # Behind the sum, it is one device's.
        again = once.copy()
        again[2, 1, 0] ^= 1
        with pytest.raises(ValueError, match=r"differs on process 0: cpu:5: a device"):
            corruption.require_equal_gradients(3, once, again)


if __name__ == "__main__":
    main()
