"""Pictures, pages and clips with questions about them."""
