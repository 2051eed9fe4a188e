"""The index: what events told, in tables that pages and the JSON API read. Nothing trusts it."""
