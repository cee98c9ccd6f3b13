-- Makes undelivered messages due at once: a dead one starts anew, a pending one need not wait any longer.
--
-- A message was overtaken where a later one of its line is delivered or in delivery; it is left alone unless that is
-- wanted. Later ones that wait are put off by a second: a claim whose snapshot does not show the retry must not
-- take one of them now.
WITH chosen AS (
    SELECT m.message_id, m.payment_id, m.destination, m.sequence, m.delivered_at IS NOT NULL AS delivered,
           m.lease_id IS NOT NULL AND m.next_attempt_at > now() AS in_delivery,
           (
               SELECT later.message_id
               FROM outbox later
               WHERE later.payment_id = m.payment_id AND later.destination = m.destination
                 AND later.sequence > m.sequence
                 AND (later.delivered_at IS NOT NULL OR later.lease_id IS NOT NULL AND later.next_attempt_at > now())
               ORDER BY later.sequence
               LIMIT 1
           ) AS overtaken_by
    FROM outbox m
    WHERE m.message_id = ANY (%(message_ids)s::bigint[])
    ORDER BY m.message_id
    FOR UPDATE
),
requeued AS (
    SELECT message_id, payment_id, destination, sequence
    FROM chosen
    WHERE NOT delivered AND NOT in_delivery AND (overtaken_by IS NULL OR %(overtaken)s::boolean)
),
changed AS (
    UPDATE outbox m SET
        dead_at = CASE WHEN r.message_id IS NULL THEN m.dead_at END,
        attempts = CASE WHEN r.message_id IS NULL THEN m.attempts ELSE 0 END,
        first_attempt_at = CASE WHEN r.message_id IS NULL THEN m.first_attempt_at END,
        lease_id = CASE WHEN r.message_id IS NULL THEN m.lease_id END,
        next_attempt_at = CASE
            WHEN r.message_id IS NULL THEN greatest(m.next_attempt_at, now() + interval '1 second')
            ELSE now()
        END
    FROM (
        SELECT affected.message_id AS affected_id, requeued.message_id
        FROM (
            SELECT message_id FROM requeued
            UNION
            SELECT later.message_id
            FROM requeued r
            JOIN outbox later USING (payment_id, destination)
            WHERE later.sequence > r.sequence AND later.delivered_at IS NULL AND later.dead_at IS NULL
        ) affected
        LEFT JOIN requeued USING (message_id)
    ) r
    WHERE m.message_id = r.affected_id
)
SELECT c.message_id, c.delivered, c.in_delivery, c.overtaken_by, r.message_id IS NOT NULL AS requeued
FROM chosen c
LEFT JOIN requeued r USING (message_id)
ORDER BY c.message_id
