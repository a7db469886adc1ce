"""What `cotra bench` measures, and how it shows the figures."""
