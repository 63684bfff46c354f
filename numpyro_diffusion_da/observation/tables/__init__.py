"""Tables of observations: reading, placing on a grid, quality control with its record, biases of instruments."""
