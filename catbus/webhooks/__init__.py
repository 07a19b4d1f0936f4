"""Webhooks: the deliveries of a consumer's messages to a URL, as HTTP POST requests that are signed.

Pure: which partition is served next (`delivery_schedule`), what follows from an attempt (`verdicts`), the request
(`signed_request`), and which addresses may be connected to (`public_addresses`). `webhook_sender` sends requests. The
leases, and the task of a replica, are in `catbus.postgres.webhooks`.
"""
