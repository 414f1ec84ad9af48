"""Replay recorded traffic against eviction policies: behind `kvpager simulate`."""
