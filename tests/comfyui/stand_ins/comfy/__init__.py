"""Small stand-ins of the parts of ComfyUI that the nodes call, after what was seen running (0.3.64)."""
