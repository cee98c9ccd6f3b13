-- Tells, for rows of a file, the state of their payment, named by its id or its order's, and of their key, where that
-- is live. Both are of one snapshot: what a live key has reserved is in its payment's refunded_amount.
SELECT r.n, p.payment_id, p.order_id, p.status, p.payment_method, p.amount, p.currency, p.refunded_amount,
       p.captured_at, p.transaction_id, k.id AS key_id,
       CASE WHEN k.response_body IS NOT NULL THEN k.status_code END AS answered_status_code,
       f.refund_id, f.amount AS refund_amount
FROM unnest(
    %(n)s::bigint[], %(payment_id)s::bigint[], %(order_id)s::bigint[], %(idempotency_key)s::text[]
) AS r (n, payment_id, order_id, idempotency_key)
LEFT JOIN payments o ON o.order_id = r.order_id
LEFT JOIN payments p ON p.payment_id = coalesce(r.payment_id, o.payment_id)
LEFT JOIN idempotency_keys k ON k.idempotency_key = r.idempotency_key AND k.caller = %(caller)s
    AND (k.response_body IS NULL OR k.expires_at > %(now)s)
LEFT JOIN refunds f ON f.refund_id = k.refund_id
ORDER BY r.n
