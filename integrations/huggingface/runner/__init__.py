"""Carry out a scheduler's step plans with a transformers model."""
