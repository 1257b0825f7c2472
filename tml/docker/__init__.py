"""The launcher: compute a plan, then carry it out with the Docker Engine. Needs neither torch nor a
project's code.

`plan` and `users` are pure; `checkout`, `pip_settings` and `image` look at files; `engine` and
`terminal` act.
"""
