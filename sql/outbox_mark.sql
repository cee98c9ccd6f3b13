-- Books what came of deliveries, for messages whose lease is still held; the others belong to somebody else.
--
-- A message that was not delivered is due again after a delay, but not beyond give_up_seconds after its first
-- delivery: at that moment it is tried a last time. One that was released was not tried at all, and is due as before.
WITH outcome AS (
    SELECT *
    FROM unnest(
        %(message_id)s::bigint[], %(lease_id)s::uuid[], %(outcome)s::text[], %(error)s::text[],
        %(delay_seconds)s::double precision[], %(due_at)s::timestamptz[]
    ) AS o (message_id, lease_id, outcome, error, delay_seconds, due_at)
),
held AS MATERIALIZED (
    SELECT o.outcome, o.error, o.delay_seconds, o.due_at, m.message_id,
           coalesce(m.first_attempt_at, now()) + make_interval(secs => %(give_up_seconds)s::double precision)
               AS give_up_at
    FROM (SELECT * FROM outcome ORDER BY message_id) o
    CROSS JOIN LATERAL (
        SELECT message_id, first_attempt_at
        FROM outbox
        WHERE outbox.message_id = o.message_id AND outbox.lease_id = o.lease_id
        FOR UPDATE
    ) m
)
UPDATE outbox m SET
    lease_id = NULL,
    attempts = m.attempts + (h.outcome <> 'released')::integer,
    first_attempt_at = CASE WHEN h.outcome = 'released' THEN m.first_attempt_at
                            ELSE coalesce(m.first_attempt_at, now()) END,
    delivered_at = CASE WHEN h.outcome = 'delivered' THEN now() END,
    dead_at = CASE WHEN h.outcome = 'refused' OR (h.outcome = 'failed' AND h.give_up_at <= now()) THEN now() END,
    last_error = coalesce(h.error, m.last_error),
    next_attempt_at = CASE
        WHEN h.outcome = 'failed'
        THEN least(now() + make_interval(secs => h.delay_seconds), greatest(h.give_up_at, now()))
        WHEN h.outcome = 'released' THEN h.due_at
        ELSE now()
    END
FROM held h
WHERE m.message_id = h.message_id
RETURNING m.message_id, m.delivered_at IS NOT NULL AS delivered, m.dead_at IS NOT NULL AS dead,
          h.outcome = 'failed' AND m.dead_at IS NULL AS failed, m.last_error AS error
