-- What each class comes to, by currency: the gateway's money by its currency, ours by ours.
WITH side AS (
    SELECT f.class, s.currency, s.counts, s.gateway, s.ours
    FROM settlement_findings f
    CROSS JOIN LATERAL (VALUES (CASE WHEN f.operation = 'refund' THEN -1 ELSE 1 END)) AS sign (factor)
    CROSS JOIN LATERAL (VALUES
        (coalesce(f.gateway_currency, f.our_currency), 1,
         CASE WHEN f.gateway_status = 'settled' THEN sign.factor * f.gateway_amount ELSE 0 END,
         CASE WHEN f.operation_key IS NOT NULL AND f.our_currency = coalesce(f.gateway_currency, f.our_currency)
              THEN sign.factor * f.our_amount ELSE 0 END),
        (CASE WHEN f.operation_key IS NOT NULL AND f.our_currency <> f.gateway_currency THEN f.our_currency END, 0,
         0, sign.factor * f.our_amount)
    ) AS s (currency, counts, gateway, ours)
    WHERE s.currency IS NOT NULL
)
SELECT class, currency, sum(counts)::bigint AS count, sum(gateway) AS gateway_net, sum(ours) AS our_net
FROM side
GROUP BY class, currency
