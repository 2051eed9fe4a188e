"""What people and machines see of a running service: logs, metrics, health.

`metrics` and `health` are imported by those who serve them; logs are everybody's.
"""

from deepsquare_chain.observe.logs import configure_logging, get_logger
from deepsquare_chain.observe.redaction import hide_secret, redact_text

__all__ = ["configure_logging", "get_logger", "hide_secret", "redact_text"]
