"""Serve transformers' entry points for continuous batching by an engine."""
