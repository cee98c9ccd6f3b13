-- Leaves the lines that are pending to later runs.
INSERT INTO settlement_lines_pending (
    run_id, operation, transaction_id, gateway_reference, amount, currency, status, settled_at
)
SELECT %(run_id)s::bigint, operation, transaction_id, gateway_reference, gateway_amount, gateway_currency,
       gateway_status, at
FROM settlement_findings
WHERE class = 'pending' AND line > 0
ON CONFLICT (transaction_id, operation, gateway_reference, status) DO NOTHING
