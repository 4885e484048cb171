"""A run and its record: the key, the look-up, whose turn it is to run, publishing, and why.

Read `call` (what a call is looked up by), `key`, `turn` (look up, serve, publish), `serializable` (one at a time),
`claiming` (the lock in the record itself), `isolation`, `explain`.
May import transactions, runs, definitions, concurrency, records, keys; never what runs bodies.
"""
