-- Who made the changes of a payment, as far as that is known.
SELECT transaction_log_id, actor
FROM transactions
WHERE payment_id = %(payment_id)s::bigint AND actor IS NOT NULL
