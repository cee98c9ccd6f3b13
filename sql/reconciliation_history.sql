-- The latest runs.
SELECT run_id, operator, started_at, ended_at, file_name, file_hash, period_from, period_to, payments, lines,
       differences, faults, repaired, counts
FROM reconciliation_runs
WHERE run_id < %(before)s::bigint
ORDER BY run_id DESC
LIMIT %(count_max)s::bigint
