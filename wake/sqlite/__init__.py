"""Django's backend for SQLite, in which the writers of a process wait for each other in a row."""
