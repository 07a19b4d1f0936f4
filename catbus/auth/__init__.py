"""Authentication and authorization: tokens, the keys that verify them, and permissions that change while connected."""
