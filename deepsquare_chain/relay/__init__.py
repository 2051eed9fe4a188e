"""The relay: pays the gas of requests that customers without coin sign for the forwarder."""
