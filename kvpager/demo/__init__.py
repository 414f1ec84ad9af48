"""`kvpager demo`: generate with DynamicCache and with kvpager, side by side.

settings    the checked options
scenarios   four workloads and their texts
model       the model, its tokenizer, and how to generate
runs        runs every scenario on both sides
comparison  the tokens that differ, and whether they are near-ties
measurement bytes needed, held and wasted, and the state of every block
traffic     many requests in a recorded engine, and the report of them
results     the figures of both sides, and their JSON form
report      the printed output
"""
