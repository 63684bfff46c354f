"""GenCast as a prior: its package, checkpoints, statistics, and a synthetic checkpoint for dry runs."""
