"""What a step of training computes, and a run of many."""
