"""Whether a model still computes what it computed before."""
