"""Helpers shared by tests of several levels."""
