"""Foreign checkpoints to ours and back; names are data, and nothing is guessed from them."""
