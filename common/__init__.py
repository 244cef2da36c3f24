"""What all commands share: error classes, safe file writing, command-line behaviour, and connections to a server."""
