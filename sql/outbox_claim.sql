-- Leases due messages of one destination: their next_attempt_at becomes the end of the lease.
--
-- Only the head of each line is due: the first open message of a payment to that destination, so that a line
-- stays in the order of its commits whoever delivers. Which one that is is looked up row by row, by index
-- and with a LIMIT: as a join the planner might compute it for the whole backlog. Leases and schedules go
-- by the database's clock, because those of replicas may differ.
WITH due AS (
    SELECT m.message_id, m.next_attempt_at AS due_at
    FROM outbox m
    WHERE m.destination = %(destination)s::text
      AND m.delivered_at IS NULL AND m.dead_at IS NULL
      AND m.next_attempt_at <= now() - make_interval(secs => %(due_for_seconds)s::double precision)
      AND m.message_id = (
          SELECT head.message_id
          FROM outbox head
          WHERE head.payment_id = m.payment_id AND head.destination = m.destination
            AND head.delivered_at IS NULL AND head.dead_at IS NULL
          ORDER BY head.sequence
          LIMIT 1
      )
    ORDER BY m.next_attempt_at
    LIMIT %(count_max)s::bigint
    FOR UPDATE SKIP LOCKED
),
leased AS (
    UPDATE outbox m SET
        next_attempt_at = now() + make_interval(secs => %(lease_seconds)s::double precision),
        lease_id = %(lease_id)s::uuid
    FROM due
    WHERE m.message_id = due.message_id
    RETURNING m.message_id, m.payment_id, m.destination, m.payload::text AS body, m.attempts, m.lease_id,
              m.request_id, m.traceparent, due.due_at
)
SELECT leased.*, payments.order_id
FROM leased
JOIN payments USING (payment_id)
