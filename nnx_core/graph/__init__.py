"""The object graph: what it is, how it is taken apart and put together again."""
