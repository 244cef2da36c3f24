"""What computes the small network."""
