"""Compare the modes of managing KV memory: the same requests in the same bytes."""
