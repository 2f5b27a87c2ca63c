"""What Amazon publishes: its operations, marketplaces, the token exchange and the RDT call. No clock, no state."""
