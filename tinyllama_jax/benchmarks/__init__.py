"""Ours beside others, on the same inputs in the same process."""
