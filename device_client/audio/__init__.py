"""Sound in and out: files, devices, and what passes between them and the frame loop."""
