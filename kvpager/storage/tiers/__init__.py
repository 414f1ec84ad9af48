"""Tiers below the device: stores that keep the bytes of cached blocks under content keys.

    tiering ─▶ loading ─▶ costs               which stores are faster than the model
       ├─────▶ saving                         what stores answered, which keys they lost
       ├─────▶ admission · namespaces         which blocks are offered; quotas, ages
       ├─────▶ followers ┄┄▶ follower         what other ranks do with their shards
       └─────▶ BlockStore (protocol)          find · load · save · drop · stats · close
                 ▲
                 ├─ host      blocks in memory
                 ├─ disk      blocks in preallocated files
                 └─ others    kvpager.integrations.valkey, .nixl; entry points
    keyed                     which key is in which slot; host stands on it
    frame ─▶ seals, layout    what stands before a block's bytes, checked at every read

A store never serves bytes from outside the process that it did not verify: a frame names the layout
and the key of its block and holds a digest of its bytes. What fails the check is a miss.
"""
