"""What systems that serve a model make of the same requests: behind `kvpager bench throughput`."""
