"""The explorer's pages: rendered on the server, readable without scripts, signed by no server."""
