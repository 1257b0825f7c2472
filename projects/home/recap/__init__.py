"""The Heavy Ranker: the probability of each engagement of a user with a post."""
