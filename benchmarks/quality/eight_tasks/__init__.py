"""Eight vision tasks from one parent: class-disjoint parts of CIFAR-10 and MNIST, merged by every method."""
