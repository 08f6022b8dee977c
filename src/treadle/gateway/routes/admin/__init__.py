"""What operators decide and see, under /admin/v1: for admin keys only."""
