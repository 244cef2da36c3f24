"""Audio input and output: sound files, sound devices, and the buffers between them and the frame loop."""
