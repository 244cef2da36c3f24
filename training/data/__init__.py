"""Speech, rooms, mixtures and examples: what there is to learn from."""
