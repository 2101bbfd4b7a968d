"""These modules are the nine strategies (`zero` holds three), their protocol and their registry."""
