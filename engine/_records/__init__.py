"""Records in a storage: read, written, kept in memory, swept.

Read `record` (what one is), `reader`, `writer`, `memory`, `roundtrip`, `failures`, `chunks`, `history` (why a
call ran), `orphans` (what killed writers left), `stores`.
May import commit, keys and the ground; it knows no run.
"""
