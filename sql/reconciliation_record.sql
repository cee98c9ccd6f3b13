-- Records a run; returns its number.
INSERT INTO reconciliation_runs (
    operator, started_at, ended_at, file_name, file_hash, period_from, period_to, payments, lines, differences, faults,
    counts
)
VALUES (
    %(operator)s::text, %(started_at)s::timestamptz, %(ended_at)s::timestamptz, %(file_name)s::text,
    %(file_hash)s::text, %(period_from)s::timestamptz, %(period_to)s::timestamptz, %(payments)s::bigint,
    %(lines)s::bigint, %(differences)s::bigint, %(faults)s::bigint, %(counts)s::jsonb
)
RETURNING run_id
