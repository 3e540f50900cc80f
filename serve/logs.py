"""Log lines as text (``name=value``) or JSON, one line per record; those that clients can cause at will are rare."""

from __future__ import annotations

import json
import logging
import time

from ..dynamic.engine.fault_log import OncePerMinute


class LineFormatter(logging.Formatter):
    """Formats a record with its ``fields``.

    Arguments:
        as_json: one JSON object per line instead of text.
    """

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in getattr(record, "fields", {}).items() if value is not None}
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        message = record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self._as_json:
            line = {"time": when, "level": record.levelname, "logger": record.name, "message": message, **fields}
            return json.dumps(line if trace is None else {**line, "trace": trace}, default=str)
        # Clients choose some of the values: quoting prevents a request from forging a second line.
        pairs = (f"{n}={v if isinstance(v, (int, float)) else json.dumps(v, default=str)}" for n, v in fields.items())
        line = " ".join((when, record.levelname, record.name, message, *pairs))
        return line if trace is None else f"{line}\n{trace}"


class RepeatFilter(logging.Filter):
    """Lets one record of each kind pass per minute; the next one says how many were left out.

    A record's kind is its attribute ``kind``, else the message of a warning. Others all pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds = OncePerMinute()

    def filter(self, record: logging.LogRecord) -> bool:
        kind = getattr(record, "kind", None) or (record.msg if record.levelno >= logging.WARNING else None)
        if kind is None:
            return True
        left_out = self._kinds.admit(kind)
        if left_out:
            record.fields = {**getattr(record, "fields", {}), "left_out": left_out}
        return left_out is not None


def configure_logging(log_format: str) -> None:
    """Send the package's log to standard error, unless the program has configured logging."""
    for name in ("dynamoe.requests", "dynamoe.connections", "dynamoe.server", "uvicorn.error"):
        logging.getLogger(name).filters = [RepeatFilter()]
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(log_format == "json"))
    for name in ("dynamoe", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger("dynamoe").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
