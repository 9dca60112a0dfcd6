"""The loss curve of tiny_debug on made-up data, as it was when it was stored.

A refactor must not move it. A change that is meant to (of initialisation, optimizer, schedule,
loss or the order of arithmetic) stores it anew, and its commit says why:

    python tests/training/test_golden_curve.py
"""

import json
import pathlib

import numpy as np

from tinyllama_jax.config import Config, load_config_file
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state, make_train_step

GOLDEN = pathlib.Path(__file__).parent / "golden/tiny_debug.json"
CONFIG_FILE = pathlib.Path(__file__).parents[2] / "configs/tiny_debug.py"
STEPS = 50
TOLERANCE = 1e-5


def make_batch(config: Config, step: int) -> Batch:
    """Rows in which an id mostly decides the next one, over an alphabet of 96 ids.

    RandomState, because NumPy promises that its streams never change.
    """
    random = np.random.RandomState(step)
    successor = np.random.RandomState(2026).permutation(96)
    rows, S = config.batch_rows, config.data.seq_len
    ids = np.empty((rows, S + 1), np.int32)
    ids[:, 0] = random.randint(0, 96, rows)
    for column in range(S):
        strays = random.randint(0, 5, rows) == 0
        ids[:, column + 1] = np.where(
            strays, random.randint(0, 96, rows), successor[ids[:, column]]
        )
    ids += 3
    # Unequal weights, so that the micro-batches of a step weigh differently.
    weights = random.randint(0, 4, (rows, S)).astype(np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], weights)


def loss_curve() -> list[float]:
    config = load_config_file(str(CONFIG_FILE))
    assert config.total_steps == STEPS and config.accumulation_steps(device_count=1) == 2
    model, optimizer = Llama(config.model), make_optimizer(config.optimizer)
    step = make_train_step(model, NextToken(config), optimizer, config)
    state = init_state(model, optimizer, config.training.seed)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, make_batch(config, number))
        losses.append(float(metrics["loss"]))
    return losses


def test_the_loss_curve_has_not_moved():
    golden, found = json.loads(GOLDEN.read_text()), loss_curve()
    differences = np.abs(np.subtract(found, golden))
    print(f"largest difference {differences.max():.1e}, at step {differences.argmax()}")
    assert len(golden) == STEPS and golden[-1] < golden[0] - 4
    assert differences.max() < TOLERANCE


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("[\n" + ",\n".join(repr(loss) for loss in loss_curve()) + "\n]\n")
    print(f"wrote {GOLDEN}")
