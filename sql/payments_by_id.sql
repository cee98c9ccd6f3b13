-- Reads payments with their audit rows and refunds, in one statement and so in one snapshot.
-- Amounts inside the JSON are text, so that no reader takes them for floats.
SELECT p.payment_id, p.order_id, p.user_id, p.amount, p.currency, p.payment_method, p.status,
       p.transaction_id, p.reference, p.authorization_code, p.gateway_response, p.created_at,
       p.updated_at, p.completed_at, p.captured_at, p.attempt, p.refunded_amount, p.refund_pending,
       p.begin_id,
       coalesce((
           SELECT json_agg(json_build_object(
               'transaction_log_id', t.transaction_log_id,
               'transaction_type', t.transaction_type,
               'amount', t.amount::text,
               'status', t.status,
               'description', t.description,
               'created_at', t.created_at
           ) ORDER BY t.transaction_log_id)
           FROM transactions t
           WHERE t.payment_id = p.payment_id
       ), '[]') AS transactions,
       coalesce((
           SELECT json_agg(json_build_object(
               'refund_id', f.refund_id,
               'amount', f.amount::text,
               'reason', f.reason,
               'status', f.status,
               'gateway_reference', f.gateway_reference,
               'gateway_response', f.gateway_response,
               'created_at', f.created_at,
               'updated_at', f.updated_at,
               'completed_at', f.completed_at
           ) ORDER BY f.refund_id)
           FROM refunds f
           WHERE f.payment_id = p.payment_id
       ), '[]') AS refunds
FROM payments p
WHERE p.payment_id = ANY (%(payment_id)s::bigint[])
