"""The engine: serves requests with any model library. It never imports transformers."""
