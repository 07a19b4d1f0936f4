"""The format of notifications, which every role of the database can hear and send."""
