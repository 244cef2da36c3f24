"""One file a command: its flags, its checks, its run."""
