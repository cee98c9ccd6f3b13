-- Reads when a file was first run, and by whom.
SELECT started_at, operator FROM bulk_runs WHERE kind = %(kind)s AND file_hash = %(file_hash)s
