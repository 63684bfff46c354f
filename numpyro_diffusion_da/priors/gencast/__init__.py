"""priors/gencast."""
