"""What was trained: reopen it, chat with it, export it."""
