"""KV events in vLLM's wire format: routers learn which prompts an engine has cached.

    manager.events ─▶ translator ─▶ wire ─▶ publisher ─▶ router
                         └─ block_names ─▶ block_hashes

settings       KVEvents: where to publish, and in which form
block_names    the names of blocks: content keys, or vLLM's block hashes
block_hashes   SHA-256 of the same bytes as vLLM
translator     events of a manager as messages
wire           messages as msgpack
publisher      a thread with two ZeroMQ sockets; it sends batches, and repeats them on request
"""

from kvpager.kv_events.settings import KVEvents

__all__ = ["KVEvents"]
