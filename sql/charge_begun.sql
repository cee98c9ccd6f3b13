-- Finds the begins that were committed although their connection was lost, in the shape of charge_begin.
--
-- The lock makes this a commit too, which waits for the synchronous standby: a begin that only this server has must not
-- be believed, for after a failover it would never have been, and its order would be charged again.
SELECT r.n, p.payment_id, p.begin_id, p.transaction_id, p.attempt, p.created_at,
       (
           SELECT max(t.transaction_log_id)
           FROM transactions t
           WHERE t.payment_id = p.payment_id AND t.transaction_type = 'PAYMENT'
       ) AS begin_log_id,
       nextval('transactions_transaction_log_id_seq') AS settle_log_id,
       k.id AS key_id
FROM unnest(
    %(n)s::bigint[], %(order_id)s::bigint[], %(begin_id)s::text[],
    %(idempotency_key)s::text[], %(caller)s::text[]
) AS r (n, order_id, begin_id, idempotency_key, caller)
JOIN payments p ON p.order_id = r.order_id AND p.begin_id = r.begin_id
LEFT JOIN idempotency_keys k
    ON k.idempotency_key = r.idempotency_key AND k.caller = r.caller AND k.payment_id = p.payment_id
FOR KEY SHARE OF p
