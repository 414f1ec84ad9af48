"""A transformers cache whose layers live in blocks."""
