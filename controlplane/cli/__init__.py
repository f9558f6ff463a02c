"""The `sandloom` command: one small module a noun, one event loop a connection.

Promise: results go to stdout and nothing else does; progress and errors go to stderr; every error is one line,
`sandloom: what failed: on what: what to do`, never a traceback. The command is a client of `sandloom.v1` and
owns only the one-host fabric of `dev up` (`cli.home` says where). It imports nothing of hostd.
"""
