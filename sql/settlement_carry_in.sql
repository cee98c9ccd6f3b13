-- Adds the lines that earlier runs left pending, under negative numbers, but for those that this file has again.
INSERT INTO settlement_lines (
    line, gateway_reference, transaction_id, operation, amount, currency, status, settled_at
)
SELECT -p.line_id, p.gateway_reference, p.transaction_id, p.operation, p.amount, p.currency, p.status, p.settled_at
FROM settlement_lines_pending p
WHERE p.ended_run_id IS NULL AND p.closed_at IS NULL
  AND NOT EXISTS (
      SELECT FROM settlement_lines l
      WHERE l.transaction_id = p.transaction_id AND l.operation = p.operation
        AND l.gateway_reference = p.gateway_reference AND l.status = p.status
  )
