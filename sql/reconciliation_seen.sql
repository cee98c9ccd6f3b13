-- The first run with the same file.
SELECT run_id FROM reconciliation_runs WHERE file_hash = %(file_hash)s::text ORDER BY run_id LIMIT 1
