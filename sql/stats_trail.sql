-- What the audit trail tells of the payments created since an instant: attempts that ended, and the money of those
-- that were completed and of refunds, by currency. The trail has no index on its instants, so it is read payment by
-- payment; the aggregate inside keeps the planner from reading all of it, which grows with the books.
SELECT p.currency,
       coalesce(sum(told.completed), 0)::bigint AS completed, coalesce(sum(told.failed), 0)::bigint AS failed,
       coalesce(sum(told.charged), 0) AS charged,
       coalesce(sum(told.refunds), 0)::bigint AS refunds, coalesce(sum(told.refunded), 0) AS refunded
FROM payments p
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE t.transaction_type = 'PAYMENT' AND t.status = 'COMPLETED') AS completed,
           count(*) FILTER (WHERE t.transaction_type = 'PAYMENT' AND t.status = 'FAILED') AS failed,
           sum(t.amount) FILTER (WHERE t.transaction_type = 'PAYMENT' AND t.status = 'COMPLETED') AS charged,
           count(*) FILTER (WHERE t.transaction_type = 'REFUND' AND t.status = 'REFUNDED') AS refunds,
           sum(t.amount) FILTER (WHERE t.transaction_type = 'REFUND' AND t.status = 'REFUNDED') AS refunded
    FROM transactions t
    WHERE t.payment_id = p.payment_id
) told
WHERE p.created_at >= %(since)s::timestamptz
GROUP BY p.currency
ORDER BY p.currency
