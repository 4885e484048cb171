"""A run as data: its states and life, futures, owners, and who waits for whom.

Read `states`, `machine` (the state machine, without I/O), `run`, `host` (what runs ask of their engine), `scope`, then
`futures`, `futurelists`, `waiting`, `arguments`, `annotations`, `owners`, `channel`, `logging`, `observing`.
May import definitions, concurrency, records and what is below them; it knows no engine, task or transaction.
"""
