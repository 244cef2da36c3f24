"""Replay of a recording through the frame loop, on the virtual or the real clock, and the report about it."""
