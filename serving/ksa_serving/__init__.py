"""The online service: event log, user states, HTTP. Imports without polars, mlflow and faiss."""
