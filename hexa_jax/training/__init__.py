"""Training: equation 10 on a device's rows, the step over devices, the loop."""
