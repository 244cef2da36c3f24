"""Live sessions: the real-time loop, its view in the terminal, and its recording."""
