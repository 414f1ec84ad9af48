"""Benchmarks behind `kvpager bench`, and the description of the machine they ran on."""
