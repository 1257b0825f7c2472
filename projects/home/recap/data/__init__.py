"""From files to batches of rows."""
