"""A training step: equation 10 on the rows of a device, and the pure functions that a run compiles."""
