"""Objects as files of one folder.

Read `storage` (the backend), `reading`, `writing` (temp file, fsync, rename), `locking` (flock, link, sync),
`streaming`, `errors` (OSError in words).
May import the runtime room and the interface; no other backend.
"""
