-- Tells why refund_begin left requests out: the state of their key and of the payment.
SELECT r.n, k.id AS key_id, k.request_hash, k.response_body, k.status_code, k.expires_at,
       k.payment_id AS key_payment_id, k.refund_id AS key_refund_id, k.begin_id AS key_begin_id,
       p.payment_id, p.status, p.amount, p.currency, p.refunded_amount, p.captured_at
FROM unnest(
    %(n)s::bigint[], %(payment_id)s::bigint[], %(idempotency_key)s::text[], %(caller)s::text[]
) AS r (n, payment_id, idempotency_key, caller)
LEFT JOIN idempotency_keys k ON k.idempotency_key = r.idempotency_key AND k.caller = r.caller
LEFT JOIN payments p ON p.payment_id = r.payment_id
