-- As outbox_candidates, from the other end: the messages that became due last.
SELECT m.message_id, m.next_attempt_at AS due_at
FROM outbox m
WHERE m.destination = %(destination)s::text
  AND m.delivered_at IS NULL AND m.dead_at IS NULL
  AND m.next_attempt_at <= now() - make_interval(secs => %(due_for_seconds)s::double precision)
  AND m.message_id = (
      SELECT head.message_id
      FROM outbox head
      WHERE head.payment_id = m.payment_id AND head.destination = m.destination
        AND coalesce(head.delivered_at, head.dead_at) IS NULL
      ORDER BY head.sequence
      LIMIT 1
  )
ORDER BY m.next_attempt_at DESC
LIMIT %(count_max)s::bigint
FOR UPDATE SKIP LOCKED
