"""The implementations of the commands of ``kb-client``."""
