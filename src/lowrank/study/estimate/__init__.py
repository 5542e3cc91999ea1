"""What a training will take, memory and time, before a weight is loaded: one step rehearsed without numbers."""
