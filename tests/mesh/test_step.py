"""The train step under a mesh, on 8 fake devices."""


def test_a_sharded_step_is_the_step(on_devices):
    on_devices("step_on_mesh")
