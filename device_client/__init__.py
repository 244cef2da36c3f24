"""The client: the small network on the device, boosted by hints from a server."""
