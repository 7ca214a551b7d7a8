"""What every wall needs to run a program: launch plans, the jail, the keeper."""
