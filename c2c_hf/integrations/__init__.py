"""Classes for other libraries, each in a file that imports the library."""
