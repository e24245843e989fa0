"""Structured logs: one event a line, to stderr."""

import logging
import sys

import structlog
from structlog.typing import FilteringBoundLogger

Log = FilteringBoundLogger


def configure_logs(process: str, *, level: str = "info", log_format: str = "console") -> Log:
    """Set up logging for this process and return its logger, bound to the process's name."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        render: list[structlog.typing.Processor] = [
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ]
    else:
        render = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=28)]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _Foreign)]
    root.addHandler(_Foreign(process))
    return logger(process)


class _Foreign(logging.Handler):
    """Makes what libraries say through the standard library lines like ours."""

    def __init__(self, process: str) -> None:
        super().__init__(logging.WARNING)
        self._process = process

    def emit(self, record: logging.LogRecord) -> None:
        message, error = record.getMessage().strip(), record.exc_info
        logger(self._process).log(
            record.levelno, message, library=record.name, **{"exc_info": error} if error else {}
        )


def logger(process: str) -> Log:
    """A logger whose lines carry the process's name."""
    bound: Log = structlog.get_logger(process=process)
    return bound
