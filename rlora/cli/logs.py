"""What the command line shows of the library's log: messages on standard output, warnings on standard error."""

import logging
import sys


class Console(logging.Handler):
    """Handler that prints messages unchanged on standard output, and warnings after "rlora: " on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno < logging.WARNING:
            print(text, flush=True)
        else:
            print(f"rlora: {text}", file=sys.stderr, flush=True)


def show_log() -> None:
    """Print the messages and warnings of the loggers `rlora.*` from now on. A second call does nothing."""
    logger = logging.getLogger("rlora")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, Console) for handler in logger.handlers):
        logger.addHandler(Console())
