"""Recipes: a whole pipeline in one file, and the grid of runs that it is for."""
