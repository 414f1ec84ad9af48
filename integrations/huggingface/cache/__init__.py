"""A transformers cache that keeps its layers in blocks."""
