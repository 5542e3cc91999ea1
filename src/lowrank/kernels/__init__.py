"""How h and its gradients are computed: the reference way, and faster ones beside it."""
