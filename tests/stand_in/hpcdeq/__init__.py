"""Stands in for hpcdeq in jobs that are about Slurm, not about training: see train.py."""
