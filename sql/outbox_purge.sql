-- Deletes a batch of messages that were delivered (or are dead) longer ago than a number of seconds.
--
-- A delivered message stays while an earlier one of its line is dead: somebody who retries that must see that
-- it was overtaken.
WITH batch AS (
    SELECT m.message_id
    FROM outbox m
    WHERE m.delivered_at < now() - make_interval(secs => %(older_than_seconds)s::double precision)
      AND NOT %(dead)s::boolean
      AND NOT EXISTS (
          SELECT FROM outbox earlier
          WHERE earlier.payment_id = m.payment_id AND earlier.sequence < m.sequence
            AND earlier.destination = m.destination AND earlier.dead_at IS NOT NULL
      )
    ORDER BY m.delivered_at
    LIMIT %(batch_size_max)s::bigint
    FOR UPDATE SKIP LOCKED
),
dead AS (
    SELECT m.message_id
    FROM outbox m
    WHERE m.dead_at < now() - make_interval(secs => %(older_than_seconds)s::double precision)
      AND %(dead)s::boolean
    ORDER BY m.destination, m.message_id
    LIMIT %(batch_size_max)s::bigint
    FOR UPDATE SKIP LOCKED
),
deleted AS (
    DELETE FROM outbox
    WHERE message_id IN (SELECT message_id FROM batch UNION ALL SELECT message_id FROM dead)
    RETURNING message_id
)
SELECT count(*) AS deleted FROM deleted
