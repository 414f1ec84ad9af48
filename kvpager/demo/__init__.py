"""`kvpager demo`: the same generation with transformers' own cache and with kvpager, side by side.

settings    what the user asked for, checked
scenarios   four workloads and their texts
session     loads the model and runs every scenario on both sides
measuring   bytes needed, held and wasted, and the state of every block
results     the figures of both sides, and JSON
report      what is printed
"""
