"""Keys and slots: who goes first, and who waits for whom.

Read `singleflight` (one run a key in this process), `locks` and `claims` (one in all processes), `limits` (slots and
rates), `deadlocks` (the wait-for graph).
May import records, commit and the ground; what waits is a `Waiter` to it, be it a run or a block.
"""
