"""Usage errors in one line."""
import argparse
import os
import sys
from typing import NoReturn


def usage_error(message: str) -> NoReturn:
    """End with exit code 2 and one line. Under torchrun every process finds the same mistake, and the first says so."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(message.split())} (--help lists the flags)", file=sys.stderr, flush=True)
    sys.exit(2)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, which shows the usage only on --help."""

    def error(self, message: str) -> NoReturn:
        usage_error(message)
