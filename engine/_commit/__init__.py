"""Several objects in one step: the commit protocol, without I/O, and its driver.

Read `protocol` (the algorithm), `requests` (what it asks for), `intents` (its bytes), `driver` (carries it out).
May import the ground and `onceflow.storage` only.
"""
