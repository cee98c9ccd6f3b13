-- What settle needs of a charge that is still PROCESSING. Its key is found by when it expires: an unfinished key
-- does so exactly one lifetime after the begin that claimed it, and that is indexed.
SELECT p.payment_id, p.begin_id, k.id AS key_id,
       nextval('transactions_transaction_log_id_seq') AS settle_log_id
FROM payments p
LEFT JOIN idempotency_keys k
    ON k.expires_at = p.updated_at + make_interval(secs => %(key_lifetime_seconds)s::double precision)
    AND k.payment_id = p.payment_id AND k.begin_id = p.begin_id AND k.refund_id IS NULL
WHERE p.payment_id = %(payment_id)s::bigint AND p.attempt = %(attempt)s::bigint AND p.status = 'PROCESSING'
