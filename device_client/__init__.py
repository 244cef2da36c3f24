"""The small network on the device, helped by hints that may come late or never."""
