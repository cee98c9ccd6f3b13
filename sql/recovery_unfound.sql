-- What recovery_find would schedule.
SELECT NULL::bigint AS recovery_id, p.payment_id, NULL::bigint AS refund_id, 'OPEN' AS state, 0 AS looks,
       NULL AS last_result,
       greatest(extract(epoch FROM %(now)s::timestamptz - p.updated_at), 0)::double precision AS age_seconds
FROM payments p
WHERE p.status = 'PROCESSING'
  AND (p.updated_at <= %(before)s::timestamptz OR p.updated_at > %(future)s::timestamptz)
  AND NOT EXISTS (
      SELECT FROM recoveries r
      WHERE r.payment_id = p.payment_id AND r.attempt = p.attempt AND r.refund_id IS NULL
  )
UNION ALL
SELECT NULL, f.payment_id, f.refund_id, 'OPEN', 0, NULL,
       greatest(extract(epoch FROM %(now)s::timestamptz - f.created_at), 0)::double precision
FROM refunds f
WHERE f.status = 'PROCESSING'
  AND (f.created_at <= %(before)s::timestamptz OR f.created_at > %(future)s::timestamptz)
  AND NOT EXISTS (SELECT FROM recoveries r WHERE r.refund_id = f.refund_id)
ORDER BY age_seconds DESC
LIMIT %(count_max)s::bigint
