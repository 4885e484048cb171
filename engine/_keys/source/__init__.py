"""What code means: the digest of a function and of all that it reaches.

Read `meaning`, `parts` and `state` (what counts), `syntax` and `bytecode` (how it is read), `modules`, `memo`.
May import `encoding` and `names` of the room around it, and the ground.
"""
