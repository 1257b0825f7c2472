"""The library: it knows no model. Projects import it; it never imports a project."""
