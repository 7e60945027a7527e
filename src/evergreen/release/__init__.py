"""From a champion's package to one that serves: canary, promotion, and the way back."""
