-- Notes unexpected errors of a process.
INSERT INTO total_changes (metric, label, count, amount) VALUES ('errors', '', %(count)s::bigint, 0)
