"""`kvpager demo`: generate with DynamicCache and with kvpager, side by side.

settings    the checked options
scenarios   four workloads and their texts
runs        loads the model and runs every scenario on both sides
measuring   bytes needed, held and wasted, and the state of every block
results     the figures of both sides, and their JSON form
report      the printed output
"""
