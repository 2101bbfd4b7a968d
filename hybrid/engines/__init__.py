"""These modules do the work of a training step. Strategies build the engines that are here."""
