"""Maintenance of the log: retention, heartbeats, and repair after rows were deleted by hand."""
