"""Control-C in a command: one line and exit code 130 instead of a traceback, from its first slow import on."""

import os
import signal
import sys


def end_in_one_line(text: str = "error: stopped by Control-C") -> None:
    """Let Control-C that nothing else takes end this process with a line; blocks that clean up run before.

    For the start of a script, under its `__main__` guard and above its imports, which take seconds.

    Args:
        text: the line, on standard error.
    """
    before = sys.excepthook

    def hook(kind, error, traceback):
        if not issubclass(kind, KeyboardInterrupt):
            return before(kind, error, traceback)
        print(text, file=sys.stderr)
        raise SystemExit(130)  # Python ends with the code of a SystemExit from here, as from a script

    def handler(number, frame):
        while frame is not None:
            # Torch drops exceptions of the imports that it makes in C++, and goes on with half of numpy.
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                print(text, file=sys.stderr, flush=True)
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    sys.excepthook = hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored, as under nohup
        signal.signal(signal.SIGINT, handler)
