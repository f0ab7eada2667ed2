"""From frames to a prompt with image features: decode, transform, plan, encode."""
