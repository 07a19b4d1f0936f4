"""Roles in the database: their administration, their lookup for `auth`, and their changes."""
