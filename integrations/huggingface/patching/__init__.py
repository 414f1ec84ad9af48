"""`kvpager.patch`: paging behind transformers models, and out again."""
