"""Lock managers and leases: one holder at a time for a key."""
