"""From the log to the send queues of subscribers: topic tree, subscriptions, fan-out, flushing."""
