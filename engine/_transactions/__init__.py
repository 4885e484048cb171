"""The records of several runs, visible together or not at all.

Read `unit` (what is staged, and how a block ends), `transaction` (the user's `async with`), `keyed` (a block with a
record of its own), `outcome` (writing it).
May import runs, concurrency, records and what is below them.
"""
