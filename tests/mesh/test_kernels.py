"""Kernels under a mesh, on 8 fake devices."""

import pytest


@pytest.mark.parametrize("what", ["losses", "attention", "embedding", "refusals"])
def test_on_8_devices(on_devices, what):
    on_devices("kernels_on_mesh", what)
