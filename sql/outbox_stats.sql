-- How many messages there are of each destination and state, and how old the oldest ones are. Delivered
-- ones are not counted: there may be a great many.
SELECT d.destination, pending.*, dead.*
FROM unnest(%(destinations)s::text[]) WITH ORDINALITY AS d (destination, n)
CROSS JOIN LATERAL (
    SELECT count(*) AS pending,
           count(lease_id) FILTER (WHERE next_attempt_at > now()) AS in_delivery,
           extract(epoch FROM now() - min(created_at))::double precision AS oldest_pending_seconds
    FROM outbox
    WHERE outbox.destination = d.destination AND delivered_at IS NULL AND dead_at IS NULL
) pending
CROSS JOIN LATERAL (
    SELECT count(*) AS dead, extract(epoch FROM now() - min(created_at))::double precision AS oldest_dead_seconds
    FROM outbox
    WHERE outbox.destination = d.destination AND dead_at IS NOT NULL
) dead
ORDER BY d.n
