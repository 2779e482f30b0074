"""`svb mcp` for tests, on an index of `shown` and without its model; arguments as those of `svb`."""

from __future__ import annotations

import sys
import threading

import shown

from svb.cli import main

if __name__ == "__main__":
    sys.argv[0] = "svb"
    with shown.made_up_model(threading.Event()):
        main()
