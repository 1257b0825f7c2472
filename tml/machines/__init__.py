"""Where this process runs: its role and rank, whether it is in a virtual environment."""
