"""The whole life of a TinyLlama-class language model in JAX.

The names below are the public Python API. They are imported when first used (PEP 562), so that
`import tinyllama_jax` is instant and brings in nothing that is not asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tinyllama_jax.config import Config as Config
    from tinyllama_jax.config import ModelConfig as ModelConfig
    from tinyllama_jax.config import SamplingConfig as SamplingConfig
    from tinyllama_jax.conversion.load import Loaded as Loaded
    from tinyllama_jax.conversion.load import load as load
    from tinyllama_jax.inference.engine import Completion as Completion
    from tinyllama_jax.inference.engine import Engine as Engine
    from tinyllama_jax.model.llama import Llama as Llama
    from tinyllama_jax.text.tokenizer import Tokenizer as Tokenizer

_HOMES = {
    "Completion": "inference.engine",
    "Config": "config",
    "Engine": "inference.engine",
    "Llama": "model.llama",
    "Loaded": "conversion.load",
    "ModelConfig": "config",
    "SamplingConfig": "config",
    "Tokenizer": "text.tokenizer",
    "load": "conversion.load",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
