"""Faults, injected for real: `python -m deploy.faults` writes deploy/FAULTS.md."""
