"""Patterns → plan → apply, and the adapters a model has."""
