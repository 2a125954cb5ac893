"""Reward models, trained from what people judged: whole completions side by side, or spans of them."""
