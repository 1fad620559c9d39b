"""hpcdeq."""
