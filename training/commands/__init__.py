"""The commands of the package, one module each, with their flags, checks and output."""
