-- Keys without an answer, of some, whose request has ended: its payment, or its refund, is settled.
SELECT 'key_unfinished' AS check_name, k.payment_id, k.refund_id, count(*) OVER () AS count,
       'key ' || k.id || ', of ' || to_char(k.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') || ' UTC' AS detail
FROM idempotency_keys k
LEFT JOIN payments p ON p.payment_id = k.payment_id
LEFT JOIN refunds f ON f.refund_id = k.refund_id
WHERE k.id BETWEEN %(first_id)s::bigint AND %(last_id)s::bigint
  AND k.response_body IS NULL
  AND (k.payment_id IS NULL OR coalesce(f.status, p.status) <> 'PROCESSING')
ORDER BY k.id
LIMIT %(count_max)s::bigint
