-- The days (UTC) of which a file has lines, the second one exclusive; NULL where it has none.
SELECT count(*) AS lines,
       date_trunc('day', min(settled_at), 'UTC') AS period_from,
       date_trunc('day', max(settled_at), 'UTC') + interval '1 day' AS period_to
FROM settlement_lines
