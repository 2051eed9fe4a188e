"""The explorer: books rebuilt from events alone, and what they prove."""
