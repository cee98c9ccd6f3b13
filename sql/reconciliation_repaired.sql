-- Notes how many differences and faults of a run were repaired.
UPDATE reconciliation_runs SET repaired = repaired + %(repaired)s::bigint WHERE run_id = %(run_id)s::bigint
