"""What `cotra bench` measures, and how it is told."""
