-- Locks a payment until the end of the transaction, and tells what its messages are made of.
SELECT payment_id, order_id, user_id, amount, currency, reference, status
FROM payments
WHERE payment_id = %(payment_id)s::bigint
FOR NO KEY UPDATE
