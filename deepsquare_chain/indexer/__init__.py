"""The indexer: events in database tables that pages and the JSON API query. Nothing trusts it."""
