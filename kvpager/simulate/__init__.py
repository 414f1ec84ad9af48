"""Replay of recorded traffic through eviction policies, for `kvpager simulate`."""
