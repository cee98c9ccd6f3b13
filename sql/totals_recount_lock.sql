-- Lets one process recount at a time, until the end of its transaction: two would put the same right twice.
SELECT pg_advisory_xact_lock(hashtextextended('eci_pay totals', 0))
