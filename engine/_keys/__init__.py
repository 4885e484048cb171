"""What makes a hit: digests of values, the meaning of code, and the policies made of both.

Read `policies`, `digest`, `encoding`, `objects`, then `arrays`, `arrow`, `bulk`, `names`, `weight`; `source` is a room
of its own.
May import the ground only.
"""
