"""What every training of a network needs: its folder, its state, its average, its processes. Loops and losses are elsewhere."""
