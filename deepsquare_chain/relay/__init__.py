"""The relay: executes requests that customers sign for the forwarder, and pays their gas."""
