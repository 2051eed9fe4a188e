"""Client operations for customers and providers: check, submit, pay, watch, cancel.

This module imports nothing, so that a command loads only the modules that it uses.
"""
