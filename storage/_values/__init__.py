"""Values to bytes and back: serializers, and the kinds of values they carry.

Read `serializers`, `codec` (msgpack), `json`, `kinds`, `classes`, then the libraries' own: `libraries`, `arrays`,
`arrow`, `pandas`, `polars`, `ipc`; `weight`.
May import the runtime room and the errors; no backend imports it.
"""
