"""Rows and tokens on disk, under the content that they were made from: written once, mapped when met again."""
