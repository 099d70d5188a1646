"""``python -m bench``: runs a command whatever characters standard output can hold, and ends quietly at Ctrl-C."""

import io
import os
import signal
import sys


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: no character is worth a measurement
    # Importing PyTorch takes seconds, and where it imports NumPy it catches any exception: Ctrl-C as one would be lost
    # there, and half of a package measured. Nothing is written yet that an end at once could harm.
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from bench import commands

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        return commands.main()
    except KeyboardInterrupt:  # ``records.output`` has said where rows lie
        return 130


if __name__ == "__main__":
    sys.exit(main())
