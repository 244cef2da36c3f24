"""What each command of ``kb-client`` does."""
