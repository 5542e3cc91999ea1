"""Adapters made from adapters or checkpoints, files alone: combine, extract, resize, convert, propose ranks."""
