# Run by PostgreSQL's image when it makes a new database: the role of the servers. The migration grants it what it needs.
psql --set=ON_ERROR_STOP=1 --set=password="$SERVICE_PASSWORD" --username="$POSTGRES_USER" "$POSTGRES_DB" <<'SQL'
CREATE ROLE eci_pay_service LOGIN PASSWORD :'password';
SQL
