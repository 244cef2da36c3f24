"""Data, losses, training and evaluation of the networks."""
