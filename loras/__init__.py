"""LoRA files of every format, and the LoRA for others."""
