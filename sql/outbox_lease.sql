-- Leases messages that outbox_candidates has locked: their next_attempt_at becomes the end of the lease.
--
-- The snapshot of this statement is younger than the locks, so a retry that has put an earlier message of the line back
-- meanwhile is seen: then the later one is left alone. Leases and schedules go by the database's clock, because
-- those of replicas may differ.
WITH leased AS (
    UPDATE outbox m SET
        next_attempt_at = clock_timestamp() + make_interval(secs => %(lease_seconds)s::double precision),
        lease_id = %(lease_id)s::uuid
    FROM unnest(%(message_ids)s::bigint[], %(due_at)s::timestamptz[]) AS due (message_id, due_at)
    WHERE m.message_id = due.message_id
      AND m.message_id = (
          SELECT head.message_id
          FROM outbox head
          WHERE head.payment_id = m.payment_id AND head.destination = m.destination
            AND coalesce(head.delivered_at, head.dead_at) IS NULL
          ORDER BY head.sequence
          LIMIT 1
      )
    RETURNING m.message_id, m.payment_id, m.destination, m.payload::text AS body, m.attempts, m.lease_id,
              m.request_id, m.traceparent, due.due_at
)
SELECT leased.*, payments.order_id
FROM leased
JOIN payments USING (payment_id)
