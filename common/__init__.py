"""What every command shares: how errors are told, how files are written, how a command line behaves.

Every command imports it before any library, and so prepares the environment that these are loaded in.
"""

from common.environment import prepare_environment

prepare_environment()
