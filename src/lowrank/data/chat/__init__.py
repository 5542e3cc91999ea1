"""Conversations as the text that serving will see: the template, the spans of the turns, what is trained of them."""
