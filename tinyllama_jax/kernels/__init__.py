"""The inner loops, each beside its readable reference."""
