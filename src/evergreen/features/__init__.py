"""Features: the tables, the point-in-time join, and the Feast store that serves them."""
