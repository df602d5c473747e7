"""The command `c2c`, one file per group of commands."""
