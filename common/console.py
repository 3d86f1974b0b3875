"""Printing on the first process alone."""
import sys

from tqdm import tqdm

from common import distributed


def print_main(*words) -> None:
    """Print on rank 0, above the progress bar."""
    if distributed.is_main():
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()
