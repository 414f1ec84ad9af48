"""The bytes of the blocks: the tensors on the device and in host memory, and the stores below.

block_storage ─▶ ops ─▶ kernels     one tensor per pool; applies the plans of a manager
      └─▶ memory, streams           page-locked memory; the order of CUDA streams
free_memory                         bytes left on a device or in a container
table_formats                       block tables for other attention kernels
keys                                content keys of blocks that leave the process
staging                             a buffer between the blocks and the stores
tiers/                              host memory, disks and servers that keep cached blocks
"""
