"""Builds collections: in this process, in several, or on several machines."""
