"""Pictures, video and sound in rows: where they are, how they are opened, what a model's processor makes of them."""
