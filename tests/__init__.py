"""The tests: a real PostgreSQL, real HTTP, real processes."""
