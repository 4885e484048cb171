"""asyncio and threads, for all three packages: the bottom of the program.

Read `threads` (the pool for short jobs), `shield` (to the end, whatever is cancelled), `loop_end`, `random`, `buffers`.
Imports nothing of onceflow.
"""
