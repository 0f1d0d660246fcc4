"""Training of populations: the Trainer, its callbacks, and the engines that run it over a grid."""
