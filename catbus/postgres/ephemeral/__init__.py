"""The ephemeral relay: messages that cross between replicas in notifications and are not in the log."""
