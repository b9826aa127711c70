"""What a model costs, whether it is right, and what is fastest."""
