-- Makes undelivered messages due at once: a dead one starts anew, a pending one need not wait any longer.
--
-- A message was overtaken where a later one of its line is delivered or in delivery; it is left alone unless that is
-- wanted. Payments and lines are locked before, in statements of their own: this one's snapshot shows all of them.
WITH chosen AS (
    SELECT m.message_id, m.delivered_at IS NOT NULL AS delivered,
           m.lease_id IS NOT NULL AND m.next_attempt_at > clock_timestamp() AS in_delivery,
           (
               SELECT later.message_id
               FROM outbox later
               WHERE later.payment_id = m.payment_id AND later.destination = m.destination
                 AND later.sequence > m.sequence AND m.dead_at IS NOT NULL
                 AND (
                     later.delivered_at IS NOT NULL
                     OR later.lease_id IS NOT NULL AND later.next_attempt_at > clock_timestamp()
                 )
               ORDER BY later.sequence
               LIMIT 1
           ) AS overtaken_by
    FROM outbox m
    WHERE m.message_id = ANY (%(message_ids)s::bigint[])
),
requeued AS (
    UPDATE outbox m SET
        dead_at = NULL,
        attempts = 0,
        first_attempt_at = NULL,
        lease_id = NULL,
        last_error = left(nullif(concat_ws('; ', %(note)s::text, m.last_error), ''), 500),
        next_attempt_at = now()
    FROM chosen c
    WHERE m.message_id = c.message_id
      AND NOT c.delivered AND NOT c.in_delivery AND (c.overtaken_by IS NULL OR %(overtaken)s::boolean)
    RETURNING m.message_id
)
SELECT c.message_id, c.delivered, c.in_delivery, c.overtaken_by, r.message_id IS NOT NULL AS requeued
FROM chosen c
LEFT JOIN requeued r USING (message_id)
ORDER BY c.message_id
