"""Tables of rows → the files, spec and statistics that training reads; prepare.py runs it."""
