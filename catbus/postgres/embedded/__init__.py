"""The embedded database: a PostgreSQL server that Catbus finds, starts and stops itself."""
