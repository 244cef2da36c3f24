"""Data, losses, training and evaluation."""

import common  # noqa: F401  # before any library is loaded
