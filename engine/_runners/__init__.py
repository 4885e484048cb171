"""Where bodies run: worker threads, worker processes, and the loop of a script.

Read `threads`, `processes`, `script`.
May import lifecycle, runs and what is below them.
"""
