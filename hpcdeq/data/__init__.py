"""Dataset files: their schema, how they are written, and how each rank reads its own rows."""
