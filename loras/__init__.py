"""LoRA files of every format: found, read, checked, written, loaded, merged and shared."""

CARD = "README.md"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers looks for it
KOHYA_WEIGHTS = "pytorch_lora_weights_kohya.safetensors"
