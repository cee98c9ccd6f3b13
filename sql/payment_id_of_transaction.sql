-- Finds a payment by its transaction_id.
SELECT payment_id FROM payments WHERE transaction_id = %(transaction_id)s
