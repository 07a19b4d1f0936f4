"""Following the log: what this replica has applied, pages read from the table, and the log's epochs."""
