"""FP8 linear layers: recipes, reference quantisers, and layers that use them without Transformer Engine."""
