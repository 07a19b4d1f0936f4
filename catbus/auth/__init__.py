"""Authentication and authorization: tokens, the keys that verify them, and grants that may change at any time."""
