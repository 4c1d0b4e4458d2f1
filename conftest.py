"""Started from a shell's background, Ctrl-C is ignored, and all that the tests start would ignore it too."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
