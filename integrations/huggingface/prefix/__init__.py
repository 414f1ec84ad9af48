"""Prefix caching for `generate`: compute equal prompts once, and reuse earlier ones."""
