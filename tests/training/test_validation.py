"""An evaluation under the watchdog: compiling may take its time, a batch may not."""

import time

import numpy as np
import pytest

from tinyllama_jax.config import Config
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.training import validation
from tinyllama_jax.training.validation import make_validation
from tinyllama_jax.training.watchdog import Watchdog

SECONDS = 0.4


class HeldOut:
    weight = 1.0

    def __init__(self, pause):
        self.pause = pause

    def batches(self, rows):
        for _ in range(4):
            time.sleep(self.pause)
            zeros = np.zeros((rows, 8), np.int32)
            yield Batch(zeros, zeros, np.ones((rows, 8), np.float32))


@pytest.mark.parametrize(
    "compiling, reading, ends",
    [(3 * SECONDS, 0.0, False), (0.0, 0.75 * SECONDS, False), (0.0, 3 * SECONDS, True)],
)
def test_what_counts_as_hanging(tmp_path, monkeypatch, compiling, reading, ends):
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda self: ended.append(True))

    def made_up(model, loss_fn):
        pauses = iter([compiling])

        def evaluate(params, batch):
            time.sleep(next(pauses, 0.0))  # the first call compiles
            return np.float32(6.0), np.float32(3.0)

        return evaluate

    monkeypatch.setattr(validation, "make_eval_step", made_up)
    with Watchdog(tmp_path, SECONDS) as watchdog:
        validate = make_validation(
            Config(), None, None, {"text": HeldOut(reading)}, lambda: False, watchdog
        )
        assert validate({}) == {"eval/text/loss": 2.0, "eval/loss": 2.0}
    assert bool(ended) == ends
