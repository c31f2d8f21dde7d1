"""Pictures, videos, latents, prompts: read with bounds, written whole or not at all."""
