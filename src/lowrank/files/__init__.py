"""Files that somebody else made: opened so that they cannot hang, read within bounds, every number checked first.

regular      what may be opened, and bytes read, not mapped    json_file    JSON within bounds of depth, digits and size
safetensors  the container of weights                          names        what may be the name of a tensor
"""
