"""The train step under a mesh, on 8 fake devices."""


def test_a_sharded_step_is_the_step(on_devices):
    on_devices("step_on_mesh")


def test_planted_faults_are_found(on_devices):
    """Sums left out along an axis, and a rule transposed: the very comparison above must fail."""
    found = dict(line.split(": ", 1) for line in on_devices("step_on_mesh", "faults").splitlines())
    assert "gradient of step 0" in found["data"] and "gradient of step 0" in found["fsdp"]
    assert "layers/mlp/down" in found["rule"]


def test_a_flipped_bit_is_found_and_named(on_devices):
    on_devices("corruption_on_mesh")
