"""The training engine that the examples share."""
