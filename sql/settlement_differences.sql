-- All that is not matched, class by class, the lines of the file in their order and then what has none.
SELECT class, operation, line, payment_id, order_id, refund_id, transaction_id, gateway_reference, our_reference,
       gateway_amount, our_amount, gateway_currency, our_currency, gateway_status, our_status, at, detail
FROM settlement_findings
WHERE class <> 'matched'
ORDER BY array_position(%(classes)s::text[], class), line NULLS LAST, at, payment_id, refund_id
