-- Records a run of a file; returns when the first one began, and who began it. Of two that begin at once, one waits
-- for the other's commit and then finds its row, which a SELECT beside DO NOTHING would miss.
INSERT INTO bulk_runs AS r (kind, file_hash, file_name, operator, row_count, started_at)
VALUES (%(kind)s, %(file_hash)s, %(file_name)s, %(operator)s, %(row_count)s, %(started_at)s)
ON CONFLICT (kind, file_hash) DO UPDATE SET runs = r.runs + 1
RETURNING started_at, operator
