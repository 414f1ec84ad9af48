"""The bytes of the blocks, on devices and in host memory."""
