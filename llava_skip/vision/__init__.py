"""Front ends: a picture's visual tokens, the retained ones first."""
