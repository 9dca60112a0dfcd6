"""A bit that flips in one device's copy of the params ends the run, which goes on from before."""

import pytest

from tests.faults.trainer import losses

FLAGS = (
    "--config.training.micro_batch_size=1", "--config.mesh.data=4", "--config.mesh.fsdp=1",
    "--config.guard.verify_every_steps=5",
)  # fmt: skip

# The door, in which a bit of device 3's part of one matrix flips before step 20.
FLIPPING = """
import runpy
from tests.mesh.corruption_on_mesh import with_flipped_bit
from tinyllama_jax.training import loop

make = loop.make_checks

def make_checks(*arguments):
    check = make(*arguments)

    def check_after_flip(step, params, batch):
        if step == 20:
            mlp = params["layers"]["mlp"]
            mlp["gate"] = with_flipped_bit(mlp["gate"], 3)
        check(step, params, batch)

    return check_after_flip

loop.make_checks = make_checks
runpy.run_module("tinyllama_jax.train", run_name="__main__", alter_sys=True)
"""


def test_a_flipped_bit_ends_the_run(trainer, uninterrupted):
    run_dir = trainer.directory / "flipped"
    run = trainer.start(run_dir, *FLAGS, devices=4, program=("-c", FLIPPING))
    assert run.wait() == [1], run.printed()
    assert "before step 20 the params of copy 3 of 4 along data are not those" in run.printed()
    assert "(process 0: cpu:3)" in run.printed() and "Traceback" not in run.printed()
    assert "resumed from step 15\n" in trainer.finish(run_dir, *FLAGS, devices=4)
    assert losses(run_dir) == pytest.approx(losses(uninterrupted), abs=1e-5)
