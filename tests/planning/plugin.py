"""Which tests need XLA's CUDA plugin."""

import importlib.util

import pytest

PLUGIN = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
with_plugin = pytest.mark.skipif(not PLUGIN, reason="needs the CUDA plugin: the [cuda13] extra")
