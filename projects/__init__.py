"""The models that are trained with tml; each folder is one project, and imports none of the
others.
"""
