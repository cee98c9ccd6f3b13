-- What COPY is given: lines as eci_pay.settlement_file writes them.
COPY settlement_lines (
    line, gateway_reference, transaction_id, operation, amount, currency, fee, status, settled_at
) FROM STDIN
