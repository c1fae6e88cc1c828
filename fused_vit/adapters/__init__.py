"""Where a FusedViT takes the place of a framework's own tower."""
