"""Detect changes of a model that make its cached keys and values invalid."""
