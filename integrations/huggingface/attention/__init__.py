"""The attention functions that transformers calls, reading blocks in place."""
