"""Rooms, one concept each. Stages import this package first: Ctrl-C ends them in one line from then on."""

import os
import re
import signal
import sys


def interrupted(*_):
    os.write(2, b"interrupted; what was finished is kept\n")
    os._exit(130)


if re.match(r"(0\d_\w+|kar|pepler|rella|peapod)\.py$", os.path.basename(sys.argv[0])):  # not in a test
    signal.signal(signal.SIGINT, interrupted)
