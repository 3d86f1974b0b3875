"""Printing on the first process alone, and progress, which is a bar in a terminal and a line now and then in a file."""
import sys
from collections.abc import Iterable

from tqdm import tqdm

from common import distributed

LINE_EVERY = 10.0  # seconds between the lines in a file


def print_main(*words) -> None:
    """Print on rank 0, above the progress bar."""
    if distributed.is_main():
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


class Progress(tqdm):
    """How far a loop is, on standard error: in a terminal a bar, which goes when the loop ends; in a file a line every
    LINE_EVERY seconds, and every twentieth of the time so far in a long run, with the time left.

    iterable: what is looped over; without one, `update` counts. total: where it cannot be told from that.
    """

    def __init__(self, iterable: Iterable | None = None, desc: str | None = None, total: int | None = None,
                 disable: bool = False, unit: str = "it", initial: int = 0):
        self.terminal, self.next_line = sys.stderr.isatty(), LINE_EVERY
        super().__init__(iterable, desc, total, leave=False, disable=disable, unit=unit, initial=initial,
                         dynamic_ncols=True)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]  # stub: None
        """Whether it was shown."""
        if self.terminal:
            return bool(super().display(msg, pos))
        elapsed = self.format_dict["elapsed"]
        if elapsed < self.next_line:
            return False
        self.next_line = elapsed + max(LINE_EVERY, elapsed / 20)
        done, rate = self.n - self.initial, (self.n - self.initial) / elapsed
        count = f"{self.n} {self.unit}" if self.total is None else f"{self.n} of {self.total} {self.unit}"
        left = f", {self.format_interval((self.total - self.n) / rate)} left" if self.total and done else ""
        self.fp.write(f"{self.desc or 'progress'}: {count}, {self.format_interval(elapsed)} gone{left}\n")
        self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        if self.terminal:
            super().clear(nolock)

    def close(self) -> None:
        if not self.terminal and not self.disable:
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]  # tqdm's stub lacks it
        super().close()
