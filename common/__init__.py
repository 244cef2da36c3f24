"""What every command shares: how errors are told, how files are written, how a command line behaves."""
