"""The train step under a mesh, on 8 fake devices."""

import pytest


def test_a_sharded_step_is_the_step(on_devices):
    on_devices("step_on_mesh")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, told",
    [("data", "gradient of step 0"), ("fsdp", "gradient of step 0"), ("rule", "layers/mlp/down")],
)
def test_a_planted_fault_is_found(on_devices, fault, told):
    with pytest.raises(AssertionError) as found:
        on_devices("step_on_mesh", fault)
    assert "AssertionError" in str(found.value) and told in str(found.value)


def test_a_flipped_bit_is_found_and_named(on_devices):
    on_devices("corruption_on_mesh")
