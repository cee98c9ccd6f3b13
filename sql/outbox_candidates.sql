-- Locks messages of one destination that seem to be due, the longest waiting first; outbox_lease takes a second look.
--
-- Only the head of each line is due: the first open message of a payment to that destination, so that a line
-- stays in the order of its commits whoever delivers. Which one that is is looked up row by row, by index
-- and with a LIMIT: as a join the planner might compute it for the whole backlog. The coalesce keeps it from
-- idx_outbox_pending: a plan that was made while the table was small would walk the whole backlog for each message.
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
ORDER BY m.next_attempt_at
LIMIT %(count_max)s::bigint
FOR UPDATE SKIP LOCKED
