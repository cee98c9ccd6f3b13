"""Equipment that breaks things for real: a gateway with a ledger of its own, a proxy, a PostgreSQL that can crash."""
