"""Storage of blocks, on devices and in host memory."""
