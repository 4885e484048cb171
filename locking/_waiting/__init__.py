"""The managers' common half: who waits in this process, and how a lease is renewed.

Read `manager`, `leases`, `keys` and `line` (first come, first served), `acquisition`, `report`, `backoff`, `shield`.
May import the interface (`_manager`, `_lease`) and the ground.
"""
