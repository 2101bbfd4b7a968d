"""The nine strategies, a file each (ZeRO's three stages share one), their protocol and registry."""
