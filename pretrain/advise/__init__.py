"""Advice before a run: short probes of this model and this text, laws fitted to them, and a recipe with its error bars."""
