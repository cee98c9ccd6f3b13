-- Ends what earlier runs have left to this one: found settled, or missing for good.
UPDATE settlements_awaited a SET ended_run_id = %(run_id)s::bigint
FROM settlement_findings f
JOIN payments p USING (payment_id)
WHERE a.ended_run_id IS NULL AND a.payment_id = f.payment_id AND a.refund_id IS NOT DISTINCT FROM f.refund_id
  AND f.operation = CASE WHEN a.refund_id IS NULL THEN 'charge' ELSE 'refund' END
  AND f.our_money AND f.class <> 'pending'
  AND (a.refund_id IS NOT NULL OR f.our_reference IS NOT DISTINCT FROM p.authorization_code)
