"""LoRA, bottleneck adapters, and weights in four bits."""
