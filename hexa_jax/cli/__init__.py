"""The commands of `hexa`."""
