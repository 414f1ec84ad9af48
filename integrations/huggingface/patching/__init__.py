"""`kvpager.patch`: page the KV caches of transformers models, until the patch is undone."""
