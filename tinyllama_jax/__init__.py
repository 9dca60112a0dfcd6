"""TinyLlama in JAX."""
