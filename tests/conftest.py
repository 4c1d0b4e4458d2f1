"""Started from a shell's background, or under nohup, Ctrl-C or a hangup is ignored, and all that the tests
start would ignore it too."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # not on Windows
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
