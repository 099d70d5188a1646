"""``python -m bench``: runs a command whatever standard output can hold; Ctrl-C or no reader ends it quietly."""

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
        status = commands.main()
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:  # ``records.output`` has said where rows lie
        return 130
    except BrokenPipeError:  # whoever reads the output has enough, as ``head`` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python writes the rest when it ends
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
