"""Replay of recorded traffic without a model, for `kvpager simulate`.

generate, replay ─▶ policies    hit ratios of eviction policies in one pool
tiers ─▶ storage/tiers          hits and writes of the tiers below it, with `--tiers`
"""
