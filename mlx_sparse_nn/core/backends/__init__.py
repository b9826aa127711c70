"""Who computes the products: one module a backend, and the rule that chooses among them."""
