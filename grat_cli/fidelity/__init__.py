"""How far each head looks, what a pattern keeps of full attention, and presets fitted to that."""
