"""priors/spherical."""
