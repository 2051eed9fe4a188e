"""What every long-running service stands on: the loop, and what it is opened with."""

from deepsquare_chain.daemon.loop import Daemon

__all__ = ["Daemon"]
