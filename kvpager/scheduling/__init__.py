"""Scheduling: decides which requests run in a step, and with how many tokens. NumPy only."""

from kvpager.scheduling.preemption import PreemptionCosts

__all__ = ["PreemptionCosts"]
