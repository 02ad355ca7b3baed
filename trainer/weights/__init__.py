"""Weights in files: checkpoints of a trial, and what it starts from."""
