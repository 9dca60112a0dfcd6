"""The Llama architecture as pure functions of its params."""
