# The command of the service `mlflow` of compose.yaml. MLflow reads the database of its users from a file only.
set -eu
umask 077
cat > "$MLFLOW_AUTH_CONFIG_PATH" << END
[mlflow]
default_permission = READ
database_uri = $MLFLOW_AUTH_DATABASE
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
grant_default_workspace_access = false
END
exec python -m flows.tracking.server --host "${LISTEN:-0.0.0.0}" --port "${PORT:-5000}" --workers 1 --app-name basic-auth \
  --allowed-hosts "mlflow:*,localhost:*,127.0.0.1:*,$MLFLOW_HOST,$MLFLOW_HOST:*" \
  --cors-allowed-origins "https://$MLFLOW_HOST" --artifacts-destination s3://ddpm/mlflow
