"""transformers' entry points for continuous batching, served by an engine."""
