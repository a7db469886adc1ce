"""Python objects over the C shim: arenas, channels, verbs, images, and the engines that search."""
