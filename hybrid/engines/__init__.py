"""Who does the work: the engines that strategies build, and what engines share."""
