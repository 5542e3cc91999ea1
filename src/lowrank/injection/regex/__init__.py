"""Regular expressions that somebody else wrote: what Python's `re` says of a name, in time that has a bound.

`re` tries one way after another, and `((\\w|\\.)+)+!` has 2ⁿ of them in a name of n characters. Here all ways are
followed at once: a set of places in the name is moved through the expression, which costs (its size · n) at most.

nodes   an expression as a tree        parse   from text to the tree
sweep   the tree on one name           table   many expressions, or one of many words, on many names
"""

from lowrank.injection.regex.table import Table

__all__ = ["Table"]
