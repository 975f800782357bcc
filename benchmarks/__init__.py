"""What is timed, how, against whom: see README.md beside this file."""
