"""The small network on the device, helped by hints that may come late or never."""

import common  # noqa: F401  # before any library is loaded
