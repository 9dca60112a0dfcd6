"""Between our params and other programs' files."""
