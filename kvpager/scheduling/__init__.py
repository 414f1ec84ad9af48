"""Which requests run in the next step, and with how many tokens. NumPy only."""

from kvpager.scheduling.preemption import PreemptionCosts

__all__ = ["PreemptionCosts"]
