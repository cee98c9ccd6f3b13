-- The next dead messages of a destination, for a retry of all of them.
SELECT message_id
FROM outbox
WHERE destination = %(destination)s::text AND dead_at IS NOT NULL AND message_id > %(after)s::bigint
ORDER BY message_id
LIMIT %(count_max)s::bigint
