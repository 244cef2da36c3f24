"""Data, losses, training and evaluation."""
