"""The base of every long-running service: the main loop, and functions to open its parts."""

from deepsquare_chain.daemon.loop import Daemon

__all__ = ["Daemon"]
