"""The priors that ship: the exact Gaussian one and the trained emulators."""
