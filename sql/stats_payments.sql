-- The payments created since an instant by status and method, in steps of their creation for the chart. Steps begin on
-- Mondays and at midnights, UTC. Found by idx_payments_created_at.
SELECT date_bin(%(step)s::interval, created_at, '2001-01-01 00:00:00+00') AS begins_at, status, payment_method,
       count(*) AS count
FROM payments
WHERE created_at >= %(since)s::timestamptz
GROUP BY begins_at, status, payment_method
