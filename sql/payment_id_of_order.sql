-- Finds the one payment of an order.
SELECT payment_id FROM payments WHERE order_id = %(order_id)s
