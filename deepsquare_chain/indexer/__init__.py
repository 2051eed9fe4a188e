"""The indexer: writes events to database tables, which the web pages and the JSON API query.

No decision of the grid depends on the index.
"""
