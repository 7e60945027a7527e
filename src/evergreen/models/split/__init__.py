"""Split scoring: of one user and many items, compute the user's half once and the items' half ahead of the request."""
