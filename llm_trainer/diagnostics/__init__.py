"""Checks of a run: will it fit in memory, what does a step really need, is resuming exact?"""
