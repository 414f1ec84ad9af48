"""One block table for each group of layers, over one pool of blocks."""
