"""What happens to a cluster from outside: event files and seeded faults (``events.py``), instances that come and go
(``availability.py``).
"""
