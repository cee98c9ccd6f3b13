-- Ends the lines left by earlier runs that are what our books say by now.
UPDATE settlement_lines_pending p SET ended_run_id = %(run_id)s::bigint
FROM settlement_findings f
WHERE p.ended_run_id IS NULL AND f.class = 'matched' AND f.transaction_id = p.transaction_id
  AND f.operation = p.operation AND f.gateway_reference = p.gateway_reference
