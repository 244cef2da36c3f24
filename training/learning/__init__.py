"""Training steps, and the runs that consist of them."""
