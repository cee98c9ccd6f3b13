-- Charges and refunds without an outcome, the oldest first.
SELECT u.*, count(*) OVER () AS count
FROM (
    SELECT p.payment_id, p.attempt, NULL::bigint AS refund_id, p.amount, p.currency, p.payment_method,
           p.updated_at AS begun_at, p.transaction_id, '' AS charge_reference,
           greatest(extract(epoch FROM %(now)s::timestamptz - p.updated_at), 0)::double precision AS age_seconds
    FROM payments p
    WHERE p.status = 'PROCESSING'
    UNION ALL
    SELECT p.payment_id, p.attempt, f.refund_id, f.amount, p.currency, p.payment_method,
           f.created_at, p.transaction_id, coalesce(p.authorization_code, ''),
           greatest(extract(epoch FROM %(now)s::timestamptz - f.created_at), 0)::double precision
    FROM refunds f
    JOIN payments p USING (payment_id)
    WHERE f.status = 'PROCESSING'
) u
ORDER BY age_seconds DESC
LIMIT %(count_max)s::bigint
