"""Continuous batching: a scheduler's step plans, carried out by transformers' own models."""
