"""The LISTEN connection: notifications, the polling fallback, and protection against forged notifications."""
