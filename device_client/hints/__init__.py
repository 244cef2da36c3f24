"""Hints from a server: sessions, the buffer for received hints, and simulated network conditions."""
