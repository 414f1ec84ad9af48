"""Attention functions for transformers that read blocks in place."""
