"""How LoRA terms are added to packed projections, and how their gradients are formed. base.py is the seam."""
