"""A base model as files: names and their dialects, how weights are stored, staging of results.

base        a checkpoint's files                           names       which tensor a module's name means
dialects    names that releases of transformers changed    orientation how the base stores W0
tied        embeddings and heads that share a tensor       lookup      which matrices are tables
blocks      rows, read into memory that is used again      staging     a folder's name, and what a crash leaves
bytes, pool moving bytes, and threads that do it
"""
