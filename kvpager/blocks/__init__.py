"""The control plane: which block holds which tokens, and which one leaves first. NumPy only."""
