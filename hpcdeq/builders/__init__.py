"""From sources (crystal structures, partial differential equations) to samples in a dataset file."""
