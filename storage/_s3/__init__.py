"""Objects of one bucket, by aiobotocore.

Read `storage` (the backend), `bucket`, `client` (one a loop), `read`, `put`, `multipart`, `version` (ETags), `probe`
(does the store honour conditions?), `options`, `errors`.
May import the runtime room and the interface; no other backend.
"""
