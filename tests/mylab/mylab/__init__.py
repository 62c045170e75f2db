"""The parts of a laboratory: one of each kind. Each module imports torch inside its methods, or not before it is chosen."""
