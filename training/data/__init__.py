"""Training data: speech, rooms, mixtures and the examples made of them."""
