"""GenCast as a prior: its package, statistics and a synthetic checkpoint."""
