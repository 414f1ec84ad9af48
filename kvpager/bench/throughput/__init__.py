"""Measure systems on the same requests: the library behind `kvpager bench throughput`."""
