"""Labels, ranks that train together, modules with weights of their own."""
