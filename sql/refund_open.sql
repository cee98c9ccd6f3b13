-- What settle needs of a refund that is still PROCESSING, in the shape of refund_begin; its key as in charge_open.
SELECT p.payment_id, p.order_id, f.begin_id, f.refund_id, f.amount, p.currency,
       p.transaction_id, p.attempt, p.payment_method, p.captured_at,
       p.authorization_code, k.id AS key_id
FROM refunds f
JOIN payments p USING (payment_id)
LEFT JOIN idempotency_keys k
    ON k.expires_at = f.created_at + make_interval(secs => %(key_lifetime_seconds)s::double precision)
    AND k.refund_id = f.refund_id AND k.begin_id = f.begin_id
WHERE f.refund_id = %(refund_id)s::bigint AND f.status = 'PROCESSING'
