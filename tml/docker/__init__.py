"""The launcher: compute a plan, then carry it out with the Docker Engine.

Needs neither torch nor a project's code. `plan` and `users` are pure; `checkout`, `image` and
`pip_settings` look at files; `build`, `engine` and `terminal` act.
"""
