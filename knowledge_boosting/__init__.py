"""A small speech network on the device, boosted by late hints of a large one elsewhere."""

from knowledge_boosting.common.environment import prepare_environment

# Before any module of this package, and so before any library that they load.
prepare_environment()
