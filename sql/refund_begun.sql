-- Finds the refunds that were committed although their connection was lost, in the shape of refund_begin.
-- The lock is there for the same reason as in charge_begun.
SELECT r.n, p.payment_id, p.order_id, f.begin_id, f.refund_id, f.amount, p.currency,
       p.transaction_id, p.attempt, p.payment_method, p.captured_at, p.authorization_code, k.id AS key_id
FROM unnest(
    %(n)s::bigint[], %(payment_id)s::bigint[], %(begin_id)s::text[],
    %(idempotency_key)s::text[], %(caller)s::text[]
) AS r (n, payment_id, begin_id, idempotency_key, caller)
JOIN refunds f ON f.payment_id = r.payment_id AND f.begin_id = r.begin_id
JOIN payments p ON p.payment_id = f.payment_id
LEFT JOIN idempotency_keys k
    ON k.idempotency_key = r.idempotency_key AND k.caller = r.caller AND k.refund_id = f.refund_id
FOR KEY SHARE OF f
