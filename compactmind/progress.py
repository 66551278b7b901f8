"""A line now and then from what would be silent for minutes."""

import time
from collections.abc import Callable


def now_and_then(seconds: float = 30.0, say: Callable[[str], None] | None = None) -> Callable[[str], None]:
    """Return a function that prints the line it is given, unless less than so many seconds have passed since the last one, or since now."""
    last = time.monotonic()

    def show(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            (say or (lambda text: print(text, flush=True)))(line)
            last = time.monotonic()

    return show
