"""Hints from a server: sessions, the buffer where they wait, and a simulated way for them."""
