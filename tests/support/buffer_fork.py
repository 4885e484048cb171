"""Writes into a read buffer in a forked child, and prints what the child and the parent find there."""

from __future__ import annotations

import os
import sys

from onceflow.storage._data import new_buffer

buffer = new_buffer(int(sys.argv[1]))
child = os.fork()
if not child:
    buffer[0] = 1
    os._exit(buffer[0])
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), buffer[0])
