"""Raw text to prepared pages, and pages to batches."""
