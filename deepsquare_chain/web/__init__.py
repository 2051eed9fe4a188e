"""The explorer's pages: rendered on the server, readable without scripts, without any keys."""
