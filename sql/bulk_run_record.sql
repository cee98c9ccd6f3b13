-- Records a run of a file; returns when the first one began, and who began it. Of two that begin at once, one waits
-- for the other's commit and then finds its row, which a SELECT beside DO NOTHING would miss. A run that comes too late
-- is no run: it changes nothing and gets no row.
INSERT INTO bulk_runs AS r (
    kind, file_hash, file_name, operator, row_count, started_at, last_operator, last_started_at
)
VALUES (
    %(kind)s, %(file_hash)s, %(file_name)s, %(operator)s, %(row_count)s, %(at)s, %(operator)s, %(at)s
)
ON CONFLICT (kind, file_hash) DO UPDATE SET
    runs = r.runs + 1,
    last_operator = EXCLUDED.last_operator,
    last_started_at = EXCLUDED.last_started_at
WHERE r.started_at BETWEEN %(first_run_min)s AND %(first_run_max)s
RETURNING started_at, operator
