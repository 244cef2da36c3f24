"""A recording through the frame loop on a computed or a real clock, and what is measured of it."""
