"""Losses, optimizer, the train step and the one loop."""
