-- Schedules looks for what has been PROCESSING for a while and has none yet: of some payments, or of all.
--
-- "A while" only spares the gateway looks at what is about to end: the instants come from the clocks of many
-- processes, and what lies in the future was written by one that is ahead. What counts for money, the grace period,
-- is counted from found_at by the database's clock.
INSERT INTO recoveries (payment_id, attempt, refund_id, amount, currency, payment_method, begun_at)
SELECT *
FROM (
    SELECT p.payment_id, p.attempt, NULL::bigint AS refund_id, p.amount, p.currency, p.payment_method, p.updated_at
    FROM payments p
    WHERE p.status = 'PROCESSING'
      AND (p.updated_at <= %(before)s::timestamptz OR p.updated_at > %(future)s::timestamptz)
      AND (%(payment_ids)s::bigint[] IS NULL OR p.payment_id = ANY (%(payment_ids)s::bigint[]))
      AND NOT EXISTS (
          SELECT FROM recoveries r
          WHERE r.payment_id = p.payment_id AND r.attempt = p.attempt AND r.refund_id IS NULL
      )
    ORDER BY p.updated_at
    LIMIT %(count_max)s::bigint
) charges
UNION ALL
SELECT *
FROM (
    SELECT f.payment_id, p.attempt, f.refund_id, f.amount, p.currency, p.payment_method, f.created_at
    FROM refunds f
    JOIN payments p USING (payment_id)
    WHERE f.status = 'PROCESSING'
      AND (f.created_at <= %(before)s::timestamptz OR f.created_at > %(future)s::timestamptz)
      AND (%(payment_ids)s::bigint[] IS NULL OR f.payment_id = ANY (%(payment_ids)s::bigint[]))
      AND NOT EXISTS (SELECT FROM recoveries r WHERE r.refund_id = f.refund_id)
    ORDER BY f.created_at
    LIMIT %(count_max)s::bigint
) refunds
ON CONFLICT DO NOTHING
RETURNING recovery_id
