"""Usage errors in one line."""
import argparse
from typing import NoReturn

from common.errors import end


def usage_error(message: str) -> NoReturn:
    """End with exit code 2 and one line. Under torchrun every process finds the same mistake, and the first says so."""
    end(f"error: {' '.join(message.split())} (--help lists the flags)", 2)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, which shows the usage only on --help."""

    def error(self, message: str) -> NoReturn:
        usage_error(message)
