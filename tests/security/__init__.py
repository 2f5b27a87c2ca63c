"""What an attacker tries, with the tools that attackers have."""
