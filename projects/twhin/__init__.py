"""TwHIN: vectors for users and items, learned from a graph of engagements."""
