"""Prompts that were computed before: found again, and computed once."""
