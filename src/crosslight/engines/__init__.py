"""How attention is computed: dense, sparse, linear, recurrent, and the masks, positions and caches they share."""
